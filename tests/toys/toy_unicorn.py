"""Runs a statically linked 64-bit ARM program of one thread: python toy_unicorn.py PROGRAM.

Unicorn emulates the processor; what the program asks of Linux is answered here: memory, the
standard streams, its end. Where there is qemu-user it does the same, and more.
"""

from __future__ import annotations

import os
import struct
import sys
from pathlib import Path
from typing import Any

from unicorn import UC_ARCH_ARM64, UC_HOOK_INTR, UC_MODE_ARM, Uc
from unicorn import arm64_const as arm

PAGE = 1 << 12
STACK, STACK_BYTES = 0x7F_0000_0000, 1 << 23
HEAP = 0x10_0000_0000  # what `mmap` gives, upwards
_LOADED = 1  # the kind of a segment that is part of the memory
_ERROR_NO_CALL = -38


def pages(size: int) -> int:
    return -(-size // PAGE) * PAGE


class Program:
    """Memory and registers of a program at its start."""

    def __init__(self, path: Path) -> None:
        self.machine = Uc(UC_ARCH_ARM64, UC_MODE_ARM)
        self.machine.ctl_set_cpu_model(arm.UC_CPU_ARM64_MAX)
        self.heap = HEAP
        image = path.read_bytes()
        self.entry, table = struct.unpack_from("<QQ", image, 24)
        entry_size, entries = struct.unpack_from("<HH", image, 54)
        segments = [
            struct.unpack_from("<IIQQQQQQ", image, table + i * entry_size) for i in range(entries)
        ]
        loaded = [s for s in segments if s[0] == _LOADED]
        low = min(s[3] for s in loaded) // PAGE * PAGE
        self.machine.mem_map(low, pages(max(s[3] + s[6] for s in loaded) - low))
        for _, _, offset, address, _, stored, _, _ in loaded:
            self.machine.mem_write(address, image[offset : offset + stored])
        self.machine.mem_map(STACK - STACK_BYTES, STACK_BYTES)
        header = next(s[3] - s[2] for s in loaded if s[2] <= table < s[2] + s[5])
        random = STACK - 64
        auxiliary = (3, header + table, 4, entry_size, 5, entries, 6, 4096, 25, random, 0, 0)
        words = (1, STACK - 32, 0, 0, *auxiliary)  # one argument, no environment
        top = (random - 8 * len(words)) // 16 * 16
        self.machine.mem_write(STACK - 32, b"program\0")
        self.machine.mem_write(top, struct.pack(f"<{len(words)}Q", *words))
        self.machine.reg_write(arm.UC_ARM64_REG_SP, top)
        self.machine.reg_write(arm.UC_ARM64_REG_CPACR_EL1, 3 << 20)  # floats are allowed
        self.machine.hook_add(UC_HOOK_INTR, self.asked)

    def run(self) -> None:
        self.machine.emu_start(self.entry, 0)

    def asked(self, machine: Uc, *_: Any) -> None:
        """A call of the kernel: its number in x8, what it takes in x0 to x5."""
        given = [machine.reg_read(arm.UC_ARM64_REG_X0 + i) for i in range(3)]
        number = machine.reg_read(arm.UC_ARM64_REG_X8)
        machine.reg_write(arm.UC_ARM64_REG_X0, self.answer(machine, number, *given) % 2**64)

    def answer(self, machine: Uc, number: int, first: int, second: int, third: int) -> int:
        if number == 63:  # read
            data = os.read(first, third)
            machine.mem_write(second, data)
            return len(data)
        if number == 64:  # write
            return os.write(first, bytes(machine.mem_read(second, third)))
        if number in (93, 94):  # exit, exit_group
            sys.stdout.flush()
            os._exit(first)
        if number == 222:  # mmap: memory alone
            start, self.heap = self.heap, self.heap + pages(second)
            machine.mem_map(start, pages(second))
            return start
        if number == 215:  # munmap
            if first % PAGE == 0 and second % PAGE == 0:
                machine.mem_unmap(first, second)
            return 0
        if number in (
            96,
            214,
            226,
            233,
        ):  # set_tid_address, brk (none to be had), mprotect, madvise
            return 1 if number == 96 else 0
        return _ERROR_NO_CALL


if __name__ == "__main__":
    Program(Path(sys.argv[1])).run()
