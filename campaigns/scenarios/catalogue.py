"""All campaigns, in the order of the list and of a run of all."""

from __future__ import annotations

from campaigns.harness.campaign import Campaign
from campaigns.scenarios import (
    archive,
    backups,
    cancel,
    clock,
    crash,
    deployments,
    failover,
    files,
    history,
    hostile,
    hostile_files,
    io,
    keys,
    lost_writes,
    machine_clock,
    migrations,
    models,
    network,
    power,
    processes,
    soak,
    stalls,
)

CAMPAIGNS: tuple[Campaign, ...] = (
    crash.CAMPAIGN,
    power.CAMPAIGN,
    lost_writes.CAMPAIGN,
    io.CAMPAIGN,
    history.CAMPAIGN,
    cancel.CAMPAIGN,
    files.CAMPAIGN,
    processes.CAMPAIGN,
    deployments.CAMPAIGN,
    network.CAMPAIGN,
    failover.CAMPAIGN,
    models.CAMPAIGN,
    hostile.CAMPAIGN,
    hostile_files.CAMPAIGN,
    migrations.CAMPAIGN,
    backups.CAMPAIGN,
    keys.CAMPAIGN,
    archive.CAMPAIGN,
    clock.CAMPAIGN,
    machine_clock.CAMPAIGN,
    soak.CAMPAIGN,
    stalls.CAMPAIGN,
)
