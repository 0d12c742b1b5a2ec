"""All campaigns, in the order in which they are listed and run."""

from __future__ import annotations

from campaigns import crash, files, history, io, lost_writes, power, soak
from campaigns.campaign import Campaign

CAMPAIGNS: tuple[Campaign, ...] = (
    crash.CAMPAIGN,
    power.CAMPAIGN,
    lost_writes.CAMPAIGN,
    io.CAMPAIGN,
    history.CAMPAIGN,
    files.CAMPAIGN,
    soak.CAMPAIGN,
)
