import pytest

from grpo_lightning.cli.errors import exit_code, root_error
from grpo_lightning.errors import ConfigurationError, DegeneracyError, EngineDiedError, RewardError


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ConfigurationError("wrong"), 2),
        (DegeneracyError("stuck\nevidence: 1\nFix: this"), 1),
        (EngineDiedError("gone"), 1),
        (RewardError("bad reward"), 1),
        (FileNotFoundError("no file"), 1),
        (SystemExit(3), 3),
        (SystemExit(), 0),
    ],
)
def test_codes(error, expected, capsys):
    with exit_code() as code:
        raise error
    assert code.value == expected
    assert capsys.readouterr().err == ("" if isinstance(error, SystemExit) else f"error: {error}\n")


def test_ctrl_c(capsys):
    with exit_code() as code:
        raise KeyboardInterrupt
    assert code.value == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_lightning_mistakes_are_mistakes_in_settings(capsys):
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    with exit_code() as code:
        raise MisconfigurationException("no such accelerator")
    assert code.value == 2
    assert "no such accelerator" in capsys.readouterr().err


def test_a_traceback_on_request(monkeypatch):
    monkeypatch.setenv("GRPO_LIGHTNING_TRACEBACK", "1")
    with pytest.raises(ConfigurationError), exit_code():
        raise ConfigurationError("wrong")


def test_defects_keep_their_traceback():
    with pytest.raises(ZeroDivisionError), exit_code():
        raise ZeroDivisionError


def test_root_error():
    inner = ConfigurationError("the cause")
    outer = ValueError("a report around it")
    outer.__cause__ = inner
    inner.__cause__ = ImportError("deeper")
    assert root_error(outer) is inner
    plain = ValueError("nothing inside")
    assert root_error(plain) is plain
