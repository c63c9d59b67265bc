// Collectives of a warpgroup: wgmma and its groups, and setmaxnreg. Fragments and descriptors are documented in
// cuda/arch/sm90.cuh.
//
// A wgmma computes its results when it starts, and keeps them: until the wait that permits them, its accumulators hold
// a NaN, and who touches them, or changes an operand, is reported.
#include "products.h"
#include "state.h"

namespace hypenet::emu {
namespace {

constexpr int kRows = 64, kDepth = 16;      // of A
constexpr uint32_t kUnderWay = 0x7fe0beef;  // a NaN: what accumulators hold
constexpr int kRegistersOfSM = 64 * 1024;
constexpr uint32_t kRowBytes = 128, kPatternBytes = 8 * kRowBytes;  // of a swizzled tile

int index_of(const Warpgroup& group) { return static_cast<int>(&group - machine.warpgroups); }

Thread& thread_of(const Warpgroup& group, int i) {
  return machine.threads[index_of(group) * kWarpgroupSize + i];
}

template <class Operands>
const Operands& operands(const Warpgroup& group, int i) {
  return *static_cast<const Operands*>(group.operands[i]);
}

// ---- operands in shared memory

struct Descriptor {
  uint32_t start, leading, stride;
};

// Decodes the descriptor of an operand [rows, 16].
Descriptor decode(const SharedOperand& x) {
  const std::string what = "wgmma: the descriptor " + hex(x.descriptor) + " of " + x.name;
  const auto field = [&](int bit) { return static_cast<uint32_t>(x.descriptor >> bit & 0x3fff) << 4; };
  const Descriptor d{field(0), field(16), field(32)};
  if (x.descriptor >> 62 != 1) {
    fail(what + " has not the swizzle of 128 bytes, the only one that is emulated");
  }
  if ((x.descriptor & 0x3fffc000c000c000) != 0) fail(what + " has bits set that must be 0");
  if (d.start % kPatternBytes >= kRowBytes) {
    fail(what + ": misaligned, it starts at shared + " + hex(d.start) + ", in row " +
         std::to_string(d.start % kPatternBytes / kRowBytes) + " of 8; tiles are aligned to 1024 bytes");
  }
  const uint32_t elements = x.k_major ? kDepth : static_cast<uint32_t>(std::min(x.rows, 64));
  if (d.start % kRowBytes + elements * 2 > kRowBytes) {
    fail(what + ": out of the tile, its rows of " + std::to_string(elements * 2) + " bytes start " +
         std::to_string(d.start % kRowBytes) + " bytes into those of the tile, of 128");
  }
  const bool uses_leading = !x.k_major && x.rows > 64;
  for (const auto& [name, bytes] :
       {std::pair{"stride", d.stride}, {"leading", uses_leading ? d.leading : 1024}}) {
    if (bytes == 0 || bytes % kPatternBytes != 0) {
      fail(what + ": misaligned, its " + name + " offset must be a multiple of 1024 bytes, not " +
           std::to_string(bytes));
    }
  }
  return d;
}

// Calls visit(offset, row, k) for each vector of 8 elements: along k if K-major, along the rows if not.
template <class Visit>
void for_each_vector(const SharedOperand& x, const Descriptor& d, const Visit& visit) {
  const int lines = x.k_major ? x.rows : kDepth, vectors = (x.k_major ? kDepth : x.rows) / 8;
  for (int line = 0; line < lines; ++line) {
    for (int v = 0; v < vectors; ++v) {
      const auto unswizzled = d.start + static_cast<uint32_t>(line / 8) * d.stride +
                              static_cast<uint32_t>(v / 8) * d.leading + line % 8 * kRowBytes + v % 8 * 16;
      const uint32_t offset = unswizzled ^ (unswizzled / kRowBytes % 8) << 4;
      x.k_major ? visit(offset, line, v * 8) : visit(offset, v * 8, line);
    }
  }
}

std::vector<uint16_t> read(const SharedOperand& x, const Descriptor& d) {
  std::vector<uint16_t> elements(static_cast<size_t>(x.rows * kDepth));
  for_each_vector(x, d, [&](uint32_t offset, int row, int k) {
    uint16_t vector[8];
    std::memcpy(vector, machine.shared + offset, sizeof vector);
    for (int i = 0; i < 8; ++i) {
      elements[(row + (x.k_major ? 0 : i)) * kDepth + k + (x.k_major ? i : 0)] = vector[i];
    }
  });
  return elements;
}

// The knowledge that all threads of a warpgroup share.
Knowledge common_knowledge(const Warpgroup& group) {
  const Machine& m = machine;
  Knowledge common;
  for (int i = 0; i < kWarpgroupSize; ++i) {
    const Thread& thread = thread_of(group, i);
    const Warp& warp = m.warps[thread.warp];
    if (thread.lane != 0 && !thread.knows_more && warp.lanes_that_know_more == 0) continue;  // as lane 0
    const Knowledge& known = knowledge(thread);
    for (int actor = 0; actor < kMaxActors; ++actor) {
      const Known of_actor = actor == thread.warp ? Known{warp.now - 1, 0, 0} : known.seen[actor];
      common.seen[actor] = i == 0 ? of_actor : both(common.seen[actor], of_actor);
    }
    for (int w = 0; w < kMaxWarps; ++w) {
      common.fenced[w] = i == 0 ? known.fenced[w] : both(common.fenced[w], known.fenced[w]);
    }
  }
  return common;
}

void start_to_read(Warpgroup& group, SharedOperand x, const GroupReader& by) {
  Machine& m = machine;
  const Descriptor d = decode(x);
  for_each_vector(x, d, [&](uint32_t offset, int row, int k) {
    if (offset + 16 > m.launch->shared_bytes) {
      fail("wgmma: " + std::string(x.name) + " is out of bounds: element (" + std::to_string(row) + ", " +
           std::to_string(k) + ") is at shared + " + hex(offset) + ", the block has " +
           std::to_string(m.launch->shared_bytes) + " bytes");
    }
    judge(m.shared_shadow.read_by_group(offset, 16, by), m.shared + offset, 16, Access::kRead, m.shared,
          "wgmma ");
  });
  x.elements = read(x, d);
  group.shared.push_back(std::move(x));
}

// ---- registers

bool is_under_way(const float* d, size_t count) {
  return std::all_of(d, d + count, [](float x) { return std::bit_cast<uint32_t>(x) == kUnderWay; });
}

bool overlap(const void* a, size_t a_bytes, const void* b, size_t b_bytes) {
  const auto *x = static_cast<const std::byte*>(a), *y = static_cast<const std::byte*>(b);
  return x < y + b_bytes && y < x + a_bytes;
}

// Registers that wgmma use must have been written before fence_wgmma.
void check_fenced(const Thread& thread, const char* name, const void* registers, size_t bytes) {
  for (const auto& [address, size] : thread.written) {
    if (!overlap(address, size, registers, bytes)) continue;
    fail("wgmma: " + name_thread(thread.index) + " wrote the registers of " + name + " after fence_wgmma");
  }
}

// The accumulator of a thread, whose result a wgmma adds to: that of an earlier one under way, or a new one.
Accumulator& accumulator(Thread& thread, const Wgmma& x, int64_t group) {
  const auto count = static_cast<size_t>(x.n / 2);
  for (Accumulator& other : thread.accumulators) {
    if (other.d == x.d && other.result.size() == count) {
      if (!is_under_way(x.d, count)) {
        fail("wgmma: " + name_thread(thread.index) +
             " wrote the accumulator while an earlier wgmma was under way");
      }
      other.group = group;
      return other;
    }
    if (overlap(other.d, other.result.size() * sizeof(float), x.d, count * sizeof(float))) {
      fail("wgmma: its accumulator overlaps one of another shape, which is under way");
    }
  }
  check_fenced(thread, "D", x.d, count * sizeof(float));
  thread.accumulators.push_back({x.d, std::vector<float>(x.d, x.d + count), group});
  std::fill_n(x.d, count, std::bit_cast<float>(kUnderWay));
  return thread.accumulators.back();
}

void land_registers(Thread& thread, int64_t num_ended) {
  for (const RegisterOperand& x : thread.operands) {
    if (x.group < num_ended && !std::equal(x.value.begin(), x.value.end(), x.a)) {
      fail("wait_wgmma: " + name_thread(thread.index) +
           " changed the registers of A while the wgmma that reads them was under way (they must live until "
           "the wait)");
    }
  }
  for (Accumulator& x : thread.accumulators) {
    if (x.group >= num_ended) continue;
    if (!is_under_way(x.d, x.result.size())) {
      fail("wait_wgmma: " + name_thread(thread.index) +
           " wrote the accumulator while its wgmma was under way");
    }
    std::copy(x.result.begin(), x.result.end(), x.d);
  }
  std::erase_if(thread.operands, [&](const auto& x) { return x.group < num_ended; });
  std::erase_if(thread.accumulators, [&](const auto& x) { return x.group < num_ended; });
}

// ---- the product

template <class Element>
void widen_all(const std::vector<uint16_t>& from, float* to) {
  for (size_t i = 0; i < from.size(); ++i) to[i] = widen(Element{from[i]});
}

std::vector<float> widened(Product product, const std::vector<uint16_t>& from) {
  std::vector<float> to(from.size());
  product == Product::kBFloat16 ? widen_all<bf16>(from, to.data()) : widen_all<fp16>(from, to.data());
  return to;
}

// A [64, 16] from the registers of all threads.
std::vector<uint16_t> gather_a(const Warpgroup& group) {
  std::vector<uint16_t> a(kRows * kDepth);
  for (int t = 0; t < kWarpgroupSize; ++t) {
    const int row = t / kWarpSize * 16 + t % kWarpSize / 4, col = t % 4 * 2;
    for (int i = 0; i < 4; ++i) {
      std::memcpy(&a[(row + i % 2 * 8) * kDepth + col + i / 2 * 8], &operands<Wgmma>(group, t).a[i], 4);
    }
  }
  return a;
}

// d [64, n] += a [64, 16] b^T, with b [n, 16].
void multiply(std::vector<float>& d, const std::vector<float>& a, const std::vector<float>& b, int n) {
  for (int block = 0; block < n; block += 8) {
    float columns[kDepth][8];
    for (int k = 0; k < kDepth; ++k) {
      for (int i = 0; i < 8; ++i) columns[k][i] = b[(block + i) * kDepth + k];
    }
    for (int m = 0; m < kRows; ++m) {
      float terms[kDepth][8], sums[8];
      for (int k = 0; k < kDepth; ++k) {
        for (int i = 0; i < 8; ++i) terms[k][i] = a[m * kDepth + k] * columns[k][i];
      }
      std::copy_n(&d[m * n + block], 8, sums);
      add_products(sums, terms);
      std::copy_n(sums, 8, &d[m * n + block]);
    }
  }
}

void check_agreement(const Warpgroup& group) {
  const auto key = [&](int t) {
    const Wgmma& x = operands<Wgmma>(group, t);
    return std::tuple(x.product, x.n, x.a_k_major, x.b_k_major, x.accumulate, x.a_descriptor, x.b_descriptor,
                      x.a == nullptr);
  };
  for (int t = 1; t < kWarpgroupSize; ++t) {
    if (key(t) == key(0)) continue;
    const Wgmma &x = operands<Wgmma>(group, t), &first = operands<Wgmma>(group, 0);
    fail("divergent wgmma: " + name_thread(thread_of(group, t).index) +
         " has other operands (descriptors of A " + hex(x.a_descriptor) + ", of B " + hex(x.b_descriptor) +
         ") than " + name_thread(thread_of(group, 0).index) + " (" + hex(first.a_descriptor) + ", " +
         hex(first.b_descriptor) + ")");
  }
}

bool start(Warpgroup& group) {
  check_agreement(group);
  const Wgmma& x = operands<Wgmma>(group, 0);
  if (!group.fenced) fail("wgmma: no fence_wgmma before the first one of its group");
  const int64_t index = group.num_groups;
  const GroupReader reader{index_of(group), group.start + static_cast<Time>(index), common_knowledge(group)};
  std::vector<float> a;
  if (x.a == nullptr) {
    start_to_read(group, {"A", x.a_descriptor, kRows, x.a_k_major, {}, index}, reader);
    a = widened(x.product, group.shared.back().elements);
  } else {
    a = widened(x.product, gather_a(group));
  }
  start_to_read(group, {"B", x.b_descriptor, x.n, x.b_k_major, {}, index}, reader);
  const auto b = widened(x.product, group.shared.back().elements);

  std::vector<float> d(static_cast<size_t>(kRows * x.n));
  const auto for_each_result = [&](int t, auto&& run) {
    const int row = t / kWarpSize * 16 + t % kWarpSize / 4, col = t % 4 * 2;
    for (int i = 0; i < x.n / 2; ++i) run(i, d[(row + i / 2 % 2 * 8) * x.n + i / 4 * 8 + col + i % 2]);
  };
  std::vector<std::vector<float>*> results;
  for (int t = 0; t < kWarpgroupSize; ++t) {
    Thread& thread = thread_of(group, t);
    const Wgmma& own = operands<Wgmma>(group, t);
    if (own.a != nullptr) {
      check_fenced(thread, "A", own.a, sizeof(uint32_t[4]));
      thread.operands.push_back({own.a, {own.a[0], own.a[1], own.a[2], own.a[3]}, index});
    }
    results.push_back(&accumulator(thread, own, index).result);
    if (x.accumulate) for_each_result(t, [&](int i, float& sum) { sum = (*results[t])[i]; });
  }
  multiply(d, a, b, x.n);
  for (int t = 0; t < kWarpgroupSize; ++t) {
    for_each_result(t, [&](int i, const float& sum) { (*results[t])[i] = sum; });
  }
  ++group.num_open;
  return true;
}

bool end_groups(Warpgroup& group) {
  const int pending = operands<int>(group, 0);
  for (int t = 1; t < kWarpgroupSize; ++t) {
    if (operands<int>(group, t) != pending) fail("divergent wait_wgmma: for different numbers of groups");
  }
  if (group.num_open > 0) {
    fail("wait_wgmma: " + std::to_string(group.num_open) + " wgmma are in no group: no commit_wgmma since");
  }
  group.num_ended = std::max(group.num_ended, group.num_groups - pending);
  for (const SharedOperand& x : group.shared) {
    if (x.group < group.num_ended && read(x, decode(x)) != x.elements) {
      fail("wait_wgmma: " + std::string(x.name) + " was changed in shared memory while a wgmma read it");
    }
  }
  std::erase_if(group.shared, [&](const auto& x) { return x.group < group.num_ended; });
  const Known ended{group.start + static_cast<Time>(group.num_ended) - 1, 0, 0};
  const int actor = kFirstWarpgroup + index_of(group);
  for (int t = 0; t < kWarpgroupSize; ++t) {
    Thread& thread = thread_of(group, t);
    land_registers(thread, group.num_ended);
    machine.warps[thread.warp].known.seen[actor] = ended;
    if (thread.knows_more) thread.known->seen[actor] = ended;
  }
  watch_registers(*machine.current);
  return true;
}

// ---- setmaxnreg

struct Registers {
  int count;
  bool up;
};

int free_registers() {
  int used = 0;
  for (int w = 0; w < machine.num_warps; ++w) used += machine.warpgroups[w / 4].registers * kWarpSize;
  return kRegistersOfSM - used;
}

bool try_to_grow(Warpgroup& group) {
  const int more = (group.wanted_registers - group.registers) * kWarpgroupSize;
  if (more > free_registers()) return false;
  group.registers = std::exchange(group.wanted_registers, 0);
  return true;
}

bool change_registers(Warpgroup& group) {
  const auto [count, up] = operands<Registers>(group, 0);
  for (int t = 1; t < kWarpgroupSize; ++t) {
    if (operands<Registers>(group, t).count != count) {
      fail("divergent set_max_registers: to different numbers");
    }
  }
  const std::string call =
      "set_max_registers_" + std::string(up ? "up<" : "down<") + std::to_string(count) + ">";
  if (up ? count < group.registers : count > group.registers) {
    fail(call + ": the warpgroup has " + std::to_string(group.registers) + " registers a thread");
  }
  if (up) {
    group.wanted_registers = count;
    return try_to_grow(group);
  }
  group.registers = count;
  for (Warpgroup& other : machine.warpgroups) {
    if (other.wanted_registers > 0 && try_to_grow(other)) release_warpgroup(other);
  }
  return true;
}

}  // namespace

void start_warpgroups() {
  const int each = std::min(kRegistersOfSM / machine.launch->num_threads / 8 * 8, 256);
  for (Warpgroup& group : machine.warpgroups) {
    group = {};
    group.start = machine.clock;
    group.registers = each;
  }
}

bool arrive_at_warpgroup(const char* what, const void* operands) {
  Machine& m = machine;
  Thread& self = *m.current;
  Warp& warp = *m.warp;
  Warpgroup& group = m.warpgroups[self.warp / 4];
  Collective& c = warp.collective;
  if (self.warp / 4 * 4 + 4 > m.num_warps) {
    fail(std::string(what) + ": needs a warpgroup, 4 warps from a multiple of 4 on");
  }
  if (warp.exited != 0 || warp.at_barrier != 0 || (c.arrived != 0 && std::strcmp(c.what, what) != 0)) {
    fail("divergent " + std::string(what) + ": the other lanes of its warp are elsewhere" + list_threads());
  }
  if (group.arrived > 0 && std::strcmp(group.what, what) != 0) {
    fail("divergent " + std::string(what) + ": other warps of its warpgroup are elsewhere" + list_threads());
  }
  group.what = c.what = what;
  group.operands[self.index % kWarpgroupSize] = operands;
  c.arrived |= 1u << self.lane;
  if (++group.arrived == kWarpgroupSize) return true;
  stop_running(warp, self.lane);
  wait();
  return false;
}

void release_warpgroup(Warpgroup& group) {
  group.arrived = 0;
  for (int i = 0; i < 4; ++i) release_warp(machine.warps[index_of(group) * 4 + i]);
}

void check_registers(const void* address, size_t bytes, Access access) {
  Thread& self = *machine.current;
  for (const Accumulator& x : self.accumulators) {
    if (!overlap(address, bytes, x.d, x.result.size() * sizeof(float))) continue;
    fail(std::string(access == Access::kRead ? "reads" : "writes") +
         " an accumulator whose wgmma is under way: no wait_wgmma since");
  }
  for (const RegisterOperand& x : self.operands) {
    if (access == Access::kRead || !overlap(address, bytes, x.a, sizeof x.value)) continue;
    fail("writes the registers of A, which a wgmma under way reads: no wait_wgmma since");
  }
  if (access == Access::kWrite && machine.warpgroups[self.warp / 4].fenced) {
    self.written.emplace_back(address, bytes);
  }
}

void wgmma(const Wgmma& operands) {
  if (reinterpret_cast<uintptr_t>(operands.d) - stack_bottom >= Stacks::kBytes) {
    fail("wgmma: the accumulator must be a local array");
  }
  warpgroup_collective("wgmma", &operands, start);
}

void fence_wgmma() {
  warpgroup_collective("fence_wgmma", nullptr, [](Warpgroup& group) {
    for (int t = 0; t < kWarpgroupSize; ++t) thread_of(group, t).written.clear();
    return group.fenced = registers_watched = true;
  });
}

void commit_wgmma() {
  warpgroup_collective("commit_wgmma", nullptr, [](Warpgroup& group) {
    ++group.num_groups;
    group.num_open = 0, group.fenced = false;
    machine.clock = std::max(machine.clock, group.start + static_cast<Time>(group.num_groups));
    watch_registers(*machine.current);
    return true;
  });
}

void wait_wgmma(int pending) { warpgroup_collective("wait_wgmma", &pending, end_groups); }

void check_landed(const float* d) {
  for (const Accumulator& x : machine.current->accumulators) {
    if (x.d == d) fail("wait_wgmma: waits for too few groups, that of this accumulator is under way");
  }
}

void set_max_registers(int count, bool up) {
  const Registers registers{count, up};
  if (count % 8 != 0 || count < 24 || count > 256) {
    fail("set_max_registers: must be a multiple of 8 in 24 to 256, got " + std::to_string(count));
  }
  warpgroup_collective(up ? "set_max_registers_up" : "set_max_registers_down", &registers, change_registers);
}

}  // namespace hypenet::emu
