"""All campaigns, in the order in which they are listed and run."""

from __future__ import annotations

from campaigns import backups, clock, network
from campaigns.campaign import Campaign

CAMPAIGNS: tuple[Campaign, ...] = (network.CAMPAIGN, backups.CAMPAIGN, clock.CAMPAIGN)
