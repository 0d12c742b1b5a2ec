"""All campaigns, in the order in which they are listed and run."""

from __future__ import annotations

from campaigns import backups, clock, history, network, soak
from campaigns.campaign import Campaign

CAMPAIGNS: tuple[Campaign, ...] = (
    history.CAMPAIGN,
    network.CAMPAIGN,
    backups.CAMPAIGN,
    clock.CAMPAIGN,
    clock.MACHINE,
    soak.CAMPAIGN,
)
