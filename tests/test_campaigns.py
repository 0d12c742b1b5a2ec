"""Each campaign in its short form, that it finds what was planted for it, and the command line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from campaigns.campaign import POSTGRESQL, Campaign, Run
from campaigns.catalogue import CAMPAIGNS

SEED = 20_261_125


def each(*, bugs: bool = False) -> Iterator[object]:
    """Campaigns and the kinds of database they are for, and the bugs they must find."""
    for campaign in CAMPAIGNS:
        for kind in campaign.kinds:
            for bug in campaign.bugs if bugs else (None,):
                marks = getattr(pytest.mark, kind)
                name = "-".join(filter(None, (campaign.name, kind, bug)))
                yield pytest.param(campaign, kind, bug, marks=marks, id=name)


def perform(
    campaign: Campaign, kind: str, bug: str | None, folder: Path, request: pytest.FixtureRequest
) -> Run:
    if why_not := campaign.why_not():
        pytest.skip(why_not)
    server = request.getfixturevalue("own_server") if kind == POSTGRESQL else None
    run = Run(kind, campaign.quick_rounds, folder, seed=SEED, server=server, bug=bug)
    campaign.perform(run)
    return run


@pytest.mark.parametrize(("campaign", "kind", "bug"), each())
def test_nothing_is_lost_and_nothing_wrong(
    campaign: Campaign, kind: str, bug: None, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    run = perform(campaign, kind, bug, tmp_path, request)

    assert not run.findings
    assert run.is_clean
    assert run.counts.operations


@pytest.mark.parametrize(("campaign", "kind", "bug"), each(bugs=True))
def test_planted_bug_is_found(
    campaign: Campaign, kind: str, bug: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    run = perform(campaign, kind, bug, tmp_path, request)

    assert run.findings
