// Checks every load and store of a kernel: those reported by the compiler, because kernels are compiled with
// -fsanitize=thread (its callbacks are implemented here, not by libtsan), and those of arch.h.
#include <link.h>

#include <algorithm>
#include <cstdio>

#include "state.h"

namespace hypenet::emu {
namespace {

const char* verb(Access access) { return access == Access::kRead ? "reads " : "writes "; }

std::string other(const Finding& finding) {
  if (finding.actor >= kFirstMbarrier) {
    return "copy_bulk with " + describe(*machine.mbarriers[finding.actor - kFirstMbarrier]);
  }
  if (finding.actor >= kFirstWarpgroup) {
    return "wgmma of warpgroup " + std::to_string(finding.actor - kFirstWarpgroup);
  }
  if (finding.lane == kManyLanes) return "threads of warp " + std::to_string(finding.actor);
  return name_thread(finding.actor * kWarpSize + finding.lane);
}

// Whether wgmma that read the place have not been waited for.
bool still_reads(const Finding& finding) {
  if (finding.actor < kFirstWarpgroup || finding.actor >= kFirstMbarrier) return false;
  const Warpgroup& group = machine.warpgroups[finding.actor - kFirstWarpgroup];
  return finding.time - group.start >= group.num_ended;
}

std::string explain(const Finding& f) {
  switch (f.problem) {
    case Problem::kUnwritten:
      return "which nobody wrote";
    case Problem::kPending:
      return "to which an asynchronous copy of " + other(f) +
             " is under way (copies land in wait_copies, and only if commit_copies closed their group; those "
             "of "
             "copy_bulk at their mbarrier)";
    case Problem::kRaceWithWrite:
      return "race: no barrier since the write by " + other(f);
    case Problem::kRaceWithRead:
      if (still_reads(f)) return other(f) + " still reads it: no wait_wgmma since";
      return "race: no barrier since the read by " + other(f);
    case Problem::kNotFenced:
      return "written by " + other(f) +
             " through the generic proxy: no fence_async_proxy by it since, or none that was "
             "followed by a barrier";
    case Problem::kOtherBlockWrote:
      return "race: another block of the launch wrote it";
    case Problem::kOtherBlockRead:
      return "race: another block of the launch read it";
    case Problem::kNone:
      break;
  }
  return "";
}

[[noreturn]] void fail_access(const void* address, size_t bytes, Access access, const std::string& why) {
  fail(verb(access) + std::to_string(bytes) + " bytes at " + place(address) + ": " + why);
}

// The loaded segments of this module; kernels may read their constants.
std::vector<std::pair<uintptr_t, uintptr_t>> own_segments() {
  std::vector<std::pair<uintptr_t, uintptr_t>> segments;
  auto visit = [](dl_phdr_info* info, size_t, void* data) {
    auto& found = *static_cast<std::vector<std::pair<uintptr_t, uintptr_t>>*>(data);
    found.clear();
    bool own = false;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
      const auto& segment = info->dlpi_phdr[i];
      const uintptr_t begin = info->dlpi_addr + segment.p_vaddr;
      if (segment.p_type != PT_LOAD) continue;
      found.emplace_back(begin, begin + segment.p_memsz);
      own = own || reinterpret_cast<uintptr_t>(&machine) - begin < segment.p_memsz;
    }
    return own ? 1 : 0;
  };
  dl_iterate_phdr(visit, &segments);
  return segments;
}

bool is_own_data(uintptr_t address) {
  static const auto segments = own_segments();
  return std::any_of(segments.begin(), segments.end(),
                     [&](const auto& s) { return address >= s.first && address < s.second; });
}

void require_aligned(const void* address, size_t bytes, Access access) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) {
    fail_access(address, bytes, access, "misaligned, not a multiple of " + std::to_string(bytes));
  }
}

void land(const AsyncCopy& copy) {
  std::byte* to = machine.shared + copy.offset;
  if (copy.valid) {
    check_global(copy.from, static_cast<size_t>(copy.bytes), Access::kRead);
    std::memcpy(to, copy.from, static_cast<size_t>(copy.bytes));
  } else {
    std::memset(to, 0, static_cast<size_t>(copy.bytes));
  }
  machine.shared_shadow.write(copy.offset, static_cast<size_t>(copy.bytes), machine.accessor(), false, true);
}

// Whether `address` is on the running thread's stack, where its registers are.
inline bool is_own_register(const void* address, size_t bytes, Access access) {
  if (reinterpret_cast<uintptr_t>(address) - stack_bottom >= Stacks::kBytes) return false;
  if (registers_watched) check_registers(address, bytes, access);
  return true;
}

}  // namespace

std::string hex(uint64_t x) {
  char text[32];
  std::snprintf(text, sizeof text, "0x%zx", static_cast<size_t>(x));
  return text;
}

std::string place(const void* address) {
  if (is_shared(address)) return "shared + " + hex(shared_offset(address));
  return machine.global.describe(reinterpret_cast<uintptr_t>(address));
}

void judge(const Finding& finding, const void* address, size_t bytes, Access access, const void* base,
           const char* who) {
  if (finding.problem == Problem::kNone) return;
  const auto* byte = static_cast<const std::byte*>(base) + finding.offset;
  fail(who + std::string(verb(access)) + std::to_string(bytes) + " bytes at " + place(address) +
       (byte > address ? ", at " + place(byte) : "") + ": " + explain(finding));
}

void check_global(const void* pointer, size_t bytes, Access access) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  const bool writes = access == Access::kWrite;
  GlobalMemory::Range* range = machine.global.find(address);
  if (range == nullptr) fail_access(pointer, bytes, access, "out of bounds");
  if (!machine.global.allows(*range, address, bytes, writes)) {
    const bool readable = machine.global.allows(*range, address, bytes, false);
    fail_access(pointer, bytes, access,
                readable ? "a tensor that the kernel must not write" : "out of bounds");
  }
  const size_t offset = address - range->begin;
  const Accessor by = machine.accessor();
  const Finding finding = writes ? range->shadow.write(offset, bytes, by, false, false)
                                 : range->shadow.read(offset, bytes, by, false);
  judge(finding, pointer, bytes, access, reinterpret_cast<const void*>(range->begin));
}

void check_shared_bounds(size_t offset, size_t bytes, Access access) {
  if (offset + bytes > machine.launch->shared_bytes) {
    fail_access(machine.shared + offset, bytes, access,
                "out of bounds, the block has " + std::to_string(machine.launch->shared_bytes) + " bytes");
  }
}

void check_shared(size_t offset, size_t bytes, Access access) {
  const std::byte* address = machine.shared + offset;
  check_shared_bounds(offset, bytes, access);
  const Accessor by = machine.accessor();
  const Finding finding = access == Access::kWrite
                              ? machine.shared_shadow.write(offset, bytes, by, false, false)
                              : machine.shared_shadow.read(offset, bytes, by, true);
  judge(finding, address, bytes, access, machine.shared);
}

void check(const void* address, size_t bytes, Access access) {
  if (stack_bottom == 0) return;  // host code of a .cu file
  if (is_own_register(address, bytes, access)) return;
  if (is_shared(address)) return check_shared(shared_offset(address), bytes, access);
  if (machine.global.find(reinterpret_cast<uintptr_t>(address)) == nullptr && access == Access::kRead &&
      is_own_data(reinterpret_cast<uintptr_t>(address))) {
    return;
  }
  check_global(address, bytes, access);
}

void check_aligned(const void* address, size_t bytes, Access access) {
  if (stack_bottom != 0) require_aligned(address, bytes, access);
}

uint4 load_16_bytes(const void* address) {
  require_aligned(address, 16, Access::kRead);
  check(address, 16, Access::kRead);
  uint4 value;
  std::memcpy(&value, address, 16);
  return value;
}

void store_16_bytes(void* address, uint4 value) {
  require_aligned(address, 16, Access::kWrite);
  check(address, 16, Access::kWrite);
  std::memcpy(address, &value, 16);
}

void copy_async(void* shared, const void* global, int bytes, bool valid) {
  const auto size = static_cast<size_t>(bytes);
  if (!is_shared(shared)) fail("copy_async: the destination does not lie in shared memory");
  const uint32_t offset = shared_offset(shared);
  require_aligned(shared, size, Access::kWrite);
  require_aligned(global, size, Access::kRead);
  if (valid) check_global(global, size, Access::kRead);
  check_shared_bounds(offset, size, Access::kWrite);
  const Finding finding = machine.shared_shadow.write(offset, size, machine.accessor(), true, false);
  judge(finding, shared, size, Access::kWrite, machine.shared);
  Thread& self = *machine.current;
  self.copies.push_back({self.num_groups, offset, global, bytes, valid});
}

void commit_copies() { ++machine.current->num_groups; }

void wait_copies(int pending) {
  Thread& self = *machine.current;
  auto& copies = self.copies;
  size_t landed = 0;
  while (landed < copies.size() && copies[landed].group < self.num_groups - pending) land(copies[landed++]);
  copies.erase(copies.begin(), copies.begin() + static_cast<std::ptrdiff_t>(landed));
}

}  // namespace hypenet::emu

// ---- callbacks of -fsanitize=thread

using hypenet::emu::Access;

namespace {

inline void seen_by_compiler(const void* address, size_t bytes, Access access) {
  if (!hypenet::emu::is_own_register(address, bytes, access)) hypenet::emu::check(address, bytes, access);
}

// Accesses to a type that is aligned to its size.
template <size_t kBytes>
inline void seen_by_compiler(const void* address, Access access) {
  if (hypenet::emu::is_own_register(address, kBytes, access)) return;
  hypenet::emu::check_aligned(address, kBytes, access);
  hypenet::emu::check(address, kBytes, access);
}

}  // namespace

extern "C" {

#define HYPENET_ACCESSES(bytes)                                                                      \
  void __tsan_read##bytes(void* p) { seen_by_compiler<bytes>(p, Access::kRead); }                    \
  void __tsan_write##bytes(void* p) { seen_by_compiler<bytes>(p, Access::kWrite); }                  \
  void __tsan_volatile_read##bytes(void* p) { seen_by_compiler<bytes>(p, Access::kRead); }           \
  void __tsan_volatile_write##bytes(void* p) { seen_by_compiler<bytes>(p, Access::kWrite); }         \
  void __tsan_unaligned_read##bytes(void* p) { seen_by_compiler(p, bytes, Access::kRead); }          \
  void __tsan_unaligned_write##bytes(void* p) { seen_by_compiler(p, bytes, Access::kWrite); }        \
  void __tsan_unaligned_volatile_read##bytes(void* p) { seen_by_compiler(p, bytes, Access::kRead); } \
  void __tsan_unaligned_volatile_write##bytes(void* p) { seen_by_compiler(p, bytes, Access::kWrite); }
HYPENET_ACCESSES(1)
HYPENET_ACCESSES(2)
HYPENET_ACCESSES(4)
HYPENET_ACCESSES(8)
HYPENET_ACCESSES(16)
#undef HYPENET_ACCESSES

// Memory functions that kernels call, under the names that arch.h gives them.
void* hypenet_emu_memcpy(void* to, const void* from, size_t bytes) {
  if (bytes == 0) return to;
  seen_by_compiler(from, bytes, Access::kRead);
  seen_by_compiler(to, bytes, Access::kWrite);
  return std::memcpy(to, from, bytes);
}
void* hypenet_emu_memmove(void* to, const void* from, size_t bytes) {
  if (bytes == 0) return to;
  seen_by_compiler(from, bytes, Access::kRead);
  seen_by_compiler(to, bytes, Access::kWrite);
  return std::memmove(to, from, bytes);
}
void* hypenet_emu_memset(void* to, int value, size_t bytes) {
  if (bytes == 0) return to;
  seen_by_compiler(to, bytes, Access::kWrite);
  return std::memset(to, value, bytes);
}
// The same under clang's names.
void* __tsan_memcpy(void* to, const void* from, size_t bytes) { return hypenet_emu_memcpy(to, from, bytes); }
void* __tsan_memmove(void* to, const void* from, size_t bytes) {
  return hypenet_emu_memmove(to, from, bytes);
}
void* __tsan_memset(void* to, int value, size_t bytes) { return hypenet_emu_memset(to, value, bytes); }

void __tsan_read_range(void* p, size_t bytes) { seen_by_compiler(p, bytes, Access::kRead); }
void __tsan_write_range(void* p, size_t bytes) { seen_by_compiler(p, bytes, Access::kWrite); }
// The guard of a function's static variable, which host code may have.
uint8_t __tsan_atomic8_load(const volatile uint8_t* p, int) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
}
