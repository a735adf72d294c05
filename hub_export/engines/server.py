"""What both servers are told."""

from dataclasses import dataclass, field


@dataclass
class ServerArguments:
    folder: str = field(metadata={"help": "Exported folder or Hub repository.", "positional": True})
    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen on."})
    port: int = field(default=8000, metadata={"help": "Port to listen on."})
    dtype: str = field(default="auto", metadata={"help": "float32, bfloat16, or auto: as the weights are."})
    allow_urls: list[str] = field(
        default_factory=list,
        metadata={"help": "Hosts from which clients may have pictures fetched; default: data: URLs only."},
    )
