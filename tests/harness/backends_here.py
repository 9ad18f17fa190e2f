"""Which backends the tests of groups run over."""

import os

import pytest

from dqrm.comm import oneccl


def _ccl() -> object:
    try:
        # Looks for the module without loading oneCCL into the tests' own process.
        problem = oneccl.module_problem()
        if problem is None and oneccl.installed_file(oneccl.PACKAGE, oneccl.LIBRARY) is None:
            problem = f"{oneccl.PACKAGE} is not installed"
    except ImportError as error:
        problem = str(error)
    if problem is not None and os.environ.get("DQRM_REQUIRE_CCL") == "1":
        raise pytest.UsageError(f"oneCCL cannot be used: {problem}")
    marks = [] if problem is None else [pytest.mark.skip(reason=f"no oneCCL: {problem}")]
    return pytest.param("ccl", marks=marks)


CCL = _ccl()
BACKENDS = [CCL, "gloo"]
