"""The claim beside an output that is being written: `.NAME.claim`, which names the process that writes it."""

from secateur.schemas.reading import Schema


class Claim(Schema):
    """The process that writes an output.

    claim: version of this format.
    host, pid: the machine and the process.
    started: when that process started, as `secateur.files.claims` writes it; empty where the system does not tell.
    id: a random number in hexadecimal; the names of the writer's temporary folders have it.
    seen: what lay at the place of the output when it was claimed, see `secateur.files.renames`; empty for nothing.
    """

    claim: int
    host: str
    pid: int
    started: str
    id: str
    seen: str
