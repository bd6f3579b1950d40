"""Every Triton kernel of bytekernels compiles within its budget, as it is launched, and is launched by some case.

A large model's in bf16 for sm_90 always; with `make test-slow` every one in bf16 for sm_90, a large model's in fp16 and
fp32 too, and a large model's in bf16 for the other chips. `make compile-check` compiles everything.
"""

import pytest

LARGE = ("--dtype", "bf16", "--case", "D=3072$|C=3072$|C=3328$|H=48|layout$|V=512$|V=128256$")  # 48 heads of 64


@pytest.mark.parametrize(
    "selection",
    [
        pytest.param(("90", *LARGE), id="sm_90"),
        pytest.param(("90", "--dtype", "bf16"), marks=pytest.mark.slow, id="sm_90 bf16"),
        pytest.param(
            ("90", "--dtype", "fp16", "--room", "ssd", "conv", "--case", "^H=48|C=3328"),
            marks=pytest.mark.slow,
            id="sm_90 fp16",
        ),
        pytest.param(("90", "--dtype", "fp32", *LARGE[2:]), marks=pytest.mark.slow, id="sm_90 fp32"),
        pytest.param(("80", *LARGE), marks=pytest.mark.slow, id="sm_80"),
        pytest.param(("100", *LARGE), marks=pytest.mark.slow, id="sm_100"),
    ],
)
def test_kernels_compile_within_budget(compile_check, selection):
    done = compile_check("--arch", *selection)
    failures = [line for line in done.stdout.splitlines() if line.startswith("FAILED ")]
    assert done.returncode == 0, "\n".join(failures) or done.stdout


def test_every_kernel_is_launched_by_a_case_and_compiled_once_for_all_batch_sizes(compile_check):
    done = compile_check("--list")
    assert done.returncode == 0, done.stdout
    labels = done.stdout.splitlines()
    assert labels
    assert not [label for label in labels if label.endswith(" odd)")]


def test_every_kernel_is_compiled_for_every_chip(compile_check):
    everything, large = (compile_check("--list", "--arch", "80", *selection) for selection in ((), LARGE))
    assert everything.returncode == large.returncode == 0, large.stdout
    kernels, selected = ({label.split()[0] for label in done.stdout.splitlines()} for done in (everything, large))
    assert selected == kernels
