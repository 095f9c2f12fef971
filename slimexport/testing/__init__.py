"""What every family must pass, on tiny random models whose sizes all differ from each other: a family of your own too.

    from slimexport.testing import CHECKS, tiny_config

    @pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
    def test_my_family(check, tmp_path):
        check(tiny_config("my_family"), tmp_path)

A check raises AssertionError with what differs. It needs no network and takes seconds.
"""

from __future__ import annotations

from slimexport.testing.checks import CHECKS, Check
from slimexport.testing.models import VARIANTS, VOCAB, kinds, tiny_config, tiny_model, tiny_tokenizer

__all__ = ["CHECKS", "VARIANTS", "VOCAB", "Check", "kinds", "tiny_config", "tiny_model", "tiny_tokenizer"]
