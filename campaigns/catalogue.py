"""All campaigns, in the order in which they are listed and run."""

from __future__ import annotations

from campaigns import cancel, processes
from campaigns.campaign import Campaign

CAMPAIGNS: tuple[Campaign, ...] = (cancel.CAMPAIGN, processes.CAMPAIGN)
