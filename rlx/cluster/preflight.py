"""What a launcher looks at before it starts anything: prompts, tokenizer, verifier."""

from __future__ import annotations

from collections.abc import Callable

from rlx.config.load import ConfigError
from rlx.config.schema import Config
from rlx.data.prompts import check_prompts
from rlx.data.tokenizer import load_tokenizer
from rlx.rewards.registry import make_verifier, needs_label


def preflight(config: Config) -> None:
    """Raise ConfigError with everything found wrong that the configuration alone does not show."""
    problems: list[str] = []

    def attempt(check: Callable[[], object]) -> None:
        try:
            check()
        except ValueError as error:
            problems.append(str(error))

    attempt(lambda: make_verifier(config.reward))
    attempt(lambda: problems.extend(_check_data(config)))
    if problems:
        raise ConfigError(problems)


def _check_data(config: Config) -> list[str]:
    tokenizer = load_tokenizer(config.model.tokenizer_path or config.model.path, config.data.chat_template)
    return check_prompts(config, tokenizer, lambda source: needs_label(config.reward, source))
