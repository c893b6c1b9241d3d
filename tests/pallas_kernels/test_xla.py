import pytest

from kernel_cases import table


@pytest.mark.parametrize("case", table(), ids=str)
def test_values_and_gradients(case):
    case.check("xla")
