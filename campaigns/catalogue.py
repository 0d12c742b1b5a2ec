"""All campaigns, in the order in which they are listed and run."""

from __future__ import annotations

from campaigns import files, history, io, soak
from campaigns.campaign import Campaign

CAMPAIGNS: tuple[Campaign, ...] = (
    io.CAMPAIGN,
    history.CAMPAIGN,
    files.CAMPAIGN,
    soak.CAMPAIGN,
)
