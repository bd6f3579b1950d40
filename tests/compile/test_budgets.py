"""Every Triton kernel of bytekernels compiles within its budget, as it is launched, and is launched by some case.

sm_90 gets every configuration, the other chips one width in bf16; `make compile-check` compiles everything.
"""

import pytest

ONE_WIDTH = ("--dtype", "bf16", "--case", "D=512$|layout$")


@pytest.mark.parametrize(
    "selection",
    [("90", "--dtype", "bf16"), ("90", "--dtype", "fp32"), ("80", *ONE_WIDTH), ("100", *ONE_WIDTH)],
    ids=["sm_90 bf16", "sm_90 fp32", "sm_80", "sm_100"],
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
