"""The exponent of growth."""

import pytest
from scaling import growth


def test_growth_is_the_exponent_since_the_last_size_of_the_same_name():
    rows = [("cut", 100, 3.0), ("EM", 100, 1.0), ("cut", 200, 6.0), ("EM", 200, 8.0)]
    rows = [{"name": name, "patches": patches, "milliseconds": time} for name, patches, time in rows]
    assert [growth(rows[:2], row) for row in rows[2:]] == [pytest.approx(1), pytest.approx(3)]
    assert growth(rows[:1], rows[1]) is None
