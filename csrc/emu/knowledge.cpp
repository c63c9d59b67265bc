// Time and knowledge of threads: what happened before what.
#include "knowledge.h"

#include "state.h"

namespace hypenet::emu {

Time now(const Thread& thread) { return std::max(thread.now, machine.warps[thread.warp].now); }

Time tick(Thread& thread) {
  Warp& warp = machine.warps[thread.warp];
  const Time before = now(thread);
  thread.now = before + 1;
  warp.latest = std::max(warp.latest, thread.now);
  machine.clock = std::max(machine.clock, warp.latest);
  return before;
}

void advance(Warp& warp) {
  warp.now = ++warp.latest;
  machine.clock = std::max(machine.clock, warp.latest);
}

const Knowledge& knowledge(const Thread& thread) {
  return thread.knows_more ? *thread.known : machine.warps[thread.warp].known;
}

void learn(Knowledge& known, const Knowledge& other) {
  const auto learn_of = [](Known& mine, const Known& theirs) {
    if ((mine.lanes | theirs.lanes) == 0) {
      mine.all = std::max(mine.all, theirs.all);
    } else {
      mine = either(mine, theirs);
    }
  };
  for (int w = 0; w < machine.num_warps; ++w) {
    learn_of(known.seen[w], other.seen[w]);
    learn_of(known.fenced[w], other.fenced[w]);
  }
  const int end = kFirstMbarrier + static_cast<int>(machine.mbarriers.size());
  for (int actor = kFirstWarpgroup; actor < end; ++actor) learn_of(known.seen[actor], other.seen[actor]);
}

void learn_alone(Thread& thread, const Knowledge& other) {
  if (!thread.knows_more) {
    Warp& warp = machine.warps[thread.warp];
    if (thread.known == nullptr) thread.known = std::make_unique<Knowledge>();
    *thread.known = warp.known;
    thread.knows_more = true;
    warp.lanes_that_know_more |= 1u << thread.lane;
  }
  learn(*thread.known, other);
}

void unite_lanes(Warp& warp) {
  const auto w = static_cast<int>(&warp - machine.warps);
  Thread* lanes = &machine.threads[w * kWarpSize];
  for (uint32_t rest = warp.lanes_that_know_more; rest != 0; rest &= rest - 1) {
    Thread& thread = lanes[std::countr_zero(rest)];
    learn(warp.known, *thread.known);
    thread.knows_more = false;
  }
  warp.lanes_that_know_more = 0;
  if (!warp.has_fences) return;
  LaneTimes fenced;
  for (int lane = 0; lane < kWarpSize; ++lane) fenced[lane] = lanes[lane].fenced;
  warp.known.fenced[w] = known_of(fenced);
}

}  // namespace hypenet::emu
