"""The training-free baseline: ``python training/baseline.py --teacher PATH --out DIR [--prompt TEXT …]``.

A byte-level model of stage 1 that has learnt nothing: the teacher's embedding of the longest vocabulary string at each
byte goes into the teacher's transformer, and its token head is read byte by byte (:class:`models.TokenHeadWriter`).
Every trained model is shown against it: ``python evals/run.py --model DIR --teacher PATH --by-tokens``.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the command works without an install

from transformers import PreTrainedModel

from models import ByteLM, ByteLMConfig, TokenHeadWriter
from models.byte_lm import core_settings
from models.command import CommandParser, counting_number
from models.suffix import Vocabulary
from training.alignment import TokenBytes
from training.errors import UserError
from training.teacher import load_teacher
from training.vocabulary import vocabulary_of

# Of the parts that nothing runs through but for the suffix features: as small as they can be.
SIZES = dict(width=16, encoder_layers=0, decoder_layers=0, state_size=16, head_dim=16, bridge_inner=1, router_inner=1)


def baseline(teacher: PreTrainedModel, vocabulary: Vocabulary) -> ByteLM:
    """A model whose encoder is its suffix features, in evaluation mode."""
    config = ByteLMConfig(core=core_settings(teacher), suffix_bytes=vocabulary.num_bytes, **SIZES)
    return ByteLM.from_teacher(teacher, config, vocabulary).eval()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = CommandParser(
        prog="baseline.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--teacher", type=Path, required=True, help="a Hugging Face folder or a GGUF file")
    parser.add_argument("--out", type=Path, required=True, help="the model's folder")
    parser.add_argument("--prompt", nargs="+", default=[], metavar="TEXT", help="continue these, greedily")
    parser.add_argument("--max-new-bytes", type=counting_number, default=100, help="of each (default: 100)")
    options = parser.parse_args(arguments)
    try:
        teacher, tokenizer = load_teacher(options.teacher)
        tokens = TokenBytes(tokenizer)
        model = baseline(teacher, vocabulary_of(tokens))
        model.save_pretrained(options.out)
        writer = TokenHeadWriter(model, vocabulary_of(tokens), tokens.encode)
        for one in writer.write(options.prompt, max_new_bytes=options.max_new_bytes):
            print(one.with_boundaries())
    except (UserError, ValueError, OSError) as error:
        parser.error(str(error))
    print(f"{options.out}: python evals/run.py --model {options.out} --teacher {options.teacher} --by-tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
