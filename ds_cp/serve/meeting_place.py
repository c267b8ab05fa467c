"""Where the supervisors of a job meet: a local socket on one host, rank 0's port between hosts, on
which its supervisor also keeps the store of all workers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ds_cp.config import Config
from ds_cp.errors import DsCpError
from ds_cp.link.door import Door
from ds_cp.link.peer import SealedPeer
from ds_cp.link.seal import Claim
from ds_cp.log_stream import say
from ds_cp.serve.job_link import FollowingLink, LeadingLink, link_name
from ds_cp.serve.job_words import Hello, stall_limit
from ds_cp.startup.own_port import own_port
from ds_cp.topology.job import Job
from ds_cp.topology.net import listening_address

SAID = 3  # strangers that are said; all are counted


class MeetingPlace:
    """``link``: of this rank. ``fail`` ends a job that cannot start, with the exit code;
    ``on_strangers`` is told how many came to rank 0's port and did not know the job's secret."""

    def __init__(
        self,
        config: Config,
        job: Job,
        link: LeadingLink | FollowingLink,
        fail: Callable[[str, int], None],
        has_started: Callable[[], bool],
    ) -> None:
        self._config = config
        self._job = job
        self._link = link
        self._fail = fail
        self._has_started = has_started
        self.on_strangers: Callable[[int], None] = lambda count: None
        self._door: Door | None = None

    @property
    def worker_job(self) -> Job:
        """The job as this rank's worker sees it: rank 0's comes to the port like all others."""
        sock = self._job.store_socket
        if sock is None or not self._job.by_port:
            return self._job
        host, port = listening_address(sock.fileno())
        return replace(self._job, store_host=host, store_port=port, store_socket=None)

    async def open(self, launched_by: str) -> None:
        """Begin to meet. ``launched_by``: as in ``link_name``."""
        if name := link_name(self._job, launched_by):
            await self._link.open(name)
        if not self._job.by_port:
            return
        port = own_port(self._job, self._config, "control")
        hang_s = stall_limit(self._config.fault_tolerance)
        if isinstance(self._link, FollowingLink):
            self._link.on_refused = self._on_refused
            outlives = self._config.fault_tolerance.min_ranks is not None
            returns_s = self._config.comm.timeout_s if outlives else 0.0
            await self._link.open_to_host(port, hang_s, returns_s)
            return
        assert self._job.store_socket is not None
        if not port.secret:
            say(
                f"warning: the job has no secret: whoever reaches {port} can join it or end it; "
                "give all ranks one, in DS_CP_JOB_SECRET or comm.secret_file"
            )
        self._door = Door(self._job.store_socket, port.secret, port.claim, port.unheard_s)
        self._door.on_control = self._on_control
        self._door.expects = self._link.why_not
        self._door.on_misfit = self._on_misfit
        self._door.on_stranger = self._on_stranger
        self._link.open_to_hosts(hang_s)
        await self._door.open()

    def close(self) -> None:
        """Let nobody in any more."""
        if self._door is not None:
            self._door.close()

    async def _on_control(self, claim: Claim, peer: SealedPeer) -> None:
        assert isinstance(self._link, LeadingLink)
        await self._link.listen(Hello(claim.rank, claim.pid, claim.host), peer)

    def _on_refused(self, err: DsCpError) -> None:
        self._fail(str(err), err.exit_code)

    def _on_misfit(self, claim: Claim, why: str) -> None:
        """A process that knows the secret is not as the others: a job that starts does not."""
        assert isinstance(self._link, LeadingLink)
        if not self._has_started() and claim.rank not in self._link.present:
            self._fail(f"rank {claim.rank} on {claim.host[:80]} cannot join: {why}", 2)

    def _on_stranger(self, address: str, why: str) -> None:
        assert self._door is not None
        count = self._door.strangers
        self.on_strangers(count)
        if count <= SAID:
            last = "; others are only counted" if count == SAID else ""
            say(f"warning: a connection from {address} was dropped: {why}{last}")
