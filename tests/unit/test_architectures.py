"""Every architecture of mlx-lm is exact or refused, and docs/architectures.md says which."""

from tempo_mlx.models.architectures import EXACT
from tests.architectures import PAGE, documented, examine, page, row
from tests.tiny_models import architectures, each_architecture

STALE = "docs/architectures.md is stale: make docs"


@each_architecture(architectures())
def test_exact_or_refused_as_documented(name):
    outcome = examine(name)
    if outcome.reason is None:
        assert name in EXACT
    else:
        assert name not in EXACT and len(outcome.reason) > 20
    assert documented().get(name) == row(outcome), STALE


def test_the_page_holds_every_architecture_and_counts_them():
    rows = documented()
    assert list(rows) == architectures(), STALE
    assert PAGE.read_text(encoding="utf-8") == page(rows.values()), STALE
    assert sum(" | exact | " in each for each in rows.values()) >= 116
    assert sum(each.endswith(" | yes | |") for each in rows.values()) >= 5, "windows"
