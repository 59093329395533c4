import math

import pytest

from grpo_lightning.bounds import require_not_negative, require_positive
from grpo_lightning.errors import ConfigurationError


@pytest.mark.parametrize("value", [0, -1, -0.5, math.inf, math.nan])
def test_positive(value):
    require_positive(one=1, small=1e-300)
    with pytest.raises(ConfigurationError, match=f"expected second > 0 and finite, but got {value}"):
        require_positive(first=1, second=value)


@pytest.mark.parametrize("value", [-1, -0.5, -math.inf, math.inf, math.nan])
def test_not_negative(value):
    require_not_negative(zero=0, one=1.5)
    with pytest.raises(ConfigurationError, match=f"expected second >= 0 and finite, but got {value}"):
        require_not_negative(first=0, second=value)
