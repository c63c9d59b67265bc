"""How many blocks of a kernel an SM holds (CUDA programming guide, technical specifications)."""

SHARED_PER_SM = {"sm_80": 164 * 1024, "sm_90": 228 * 1024, "sm_90a": 228 * 1024}
SHARED_OVERHEAD, SHARED_UNIT = 1024, 128  # every block takes 1 KB in addition to its own
REGISTERS, REGISTER_UNIT, WARP_SIZE, PARTITIONS = 64 * 1024, 256, 32, 4
MAX_THREADS, MAX_BLOCKS = 2048, 32


def blocks_per_sm(target: str, registers: int, threads: int, shared: int) -> int:
    """Return the number of resident blocks per SM: the least that registers, shared memory and threads allow."""
    warps = -(-threads // WARP_SIZE)
    registers_of_warp = -(-max(registers, 1) * WARP_SIZE // REGISTER_UNIT) * REGISTER_UNIT
    by_registers = REGISTERS // PARTITIONS // registers_of_warp * PARTITIONS // warps
    shared_of_block = -(-(shared + SHARED_OVERHEAD) // SHARED_UNIT) * SHARED_UNIT
    by_shared = SHARED_PER_SM[target] // shared_of_block
    return min(by_registers, by_shared, MAX_THREADS // (warps * WARP_SIZE), MAX_BLOCKS)
