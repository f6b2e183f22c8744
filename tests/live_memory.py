"""How many bytes of tensors are alive: what an allocator would say, without asking one."""

from ssiuu_fast.planning.live_memory import LiveMemory

__all__ = ["LiveMemory"]
