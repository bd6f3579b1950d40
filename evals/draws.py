"""Random draws that repeat: the same on every machine and in every process."""

import hashlib
import json
import random


def generator(*key: str | int) -> random.Random:
    """A random generator that depends on its key, and on nothing else.

    Args:
        key: what is drawn for, such as a task's name, a seed and a question's number; "1" and 1 are different.
    """
    return random.Random(int.from_bytes(hashlib.blake2b(json.dumps(key).encode(), digest_size=16).digest()))
