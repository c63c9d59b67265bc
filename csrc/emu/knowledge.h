// Happens-before, as vector clocks: which accesses of others happened before a thread's next one.
//
// Time. Each warp, and each other actor (below), counts its own time. A warp has `now`, the time of its last
// synchronisation as a whole; a lane that releases something alone, by arriving at an mbarrier or by a fence, runs
// ahead of it until the whole warp synchronises again. An access has the time of its lane. Knowledge of an actor is the
// time up to which all that it did happened before; knowledge travels from those who arrive to those who wait.
//
// Actors. Besides warps: warpgroups, whose wgmma read shared memory on their own, and mbarriers, for which copy_bulk
// writes it.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

namespace hypenet::emu {

constexpr int kMaxWarps = 32;
constexpr int kMaxWarpgroups = kMaxWarps / 4;
constexpr int kMaxMbarriers = 32;
constexpr int kFirstWarpgroup = kMaxWarps;
constexpr int kFirstMbarrier = kFirstWarpgroup + kMaxWarpgroups;
constexpr int kMaxActors = kFirstMbarrier + kMaxMbarriers;

using Time = uint32_t;
using LaneTimes = std::array<Time, 32>;

constexpr int kManyLanes = 32;  // instead of a lane: several of the warp

// Knowledge of one actor: of all its lanes up to time `all`, and of those in `lanes` up to `some`. Lanes that do the
// same are at the same time, so two times are enough. Of lanes at a third time less is known than could be: a race may
// be reported where there is none, which a sync_warp before the arrival cures.
struct Known {
  Time all = 0, some = 0;
  uint32_t lanes = 0;

  bool covers(Time time, int lane) const {
    return time <= all || (time <= some && (uint64_t{lanes} >> lane & 1) != 0);
  }
};

inline Known known_of(const LaneTimes& times) {
  const auto [least, most] = std::minmax_element(times.begin(), times.end());
  Known known{*least, *most, 0};
  for (int lane = 0; lane < 32 && *least < *most; ++lane) {
    known.lanes |= uint32_t{times[lane] == *most} << lane;
  }
  return known;
}

// The union of two states of knowledge.
inline Known either(const Known& a, const Known& b) {
  Known known{std::max(a.all, b.all), 0, 0};
  const bool from_a = a.lanes != 0 && a.some > known.all, from_b = b.lanes != 0 && b.some > known.all;
  if (from_a && from_b) {
    if (a.some >= b.some && (b.lanes & ~a.lanes) == 0) {
      known.some = a.some, known.lanes = a.lanes;
    } else if (b.some >= a.some && (a.lanes & ~b.lanes) == 0) {
      known.some = b.some, known.lanes = b.lanes;
    } else {
      known.some = std::min(a.some, b.some), known.lanes = a.lanes | b.lanes;
    }
  } else if (from_a || from_b) {
    known.some = from_a ? a.some : b.some, known.lanes = from_a ? a.lanes : b.lanes;
  }
  if (known.lanes == ~0u) known = {known.some, 0, 0};
  return known;
}

// Their intersection.
inline Known both(const Known& a, const Known& b) {
  const Time all = std::min(a.all, b.all);
  const bool more_of_a = a.all > all, more_of_b = b.all > all;
  const uint32_t lanes = (more_of_a ? ~0u : a.lanes) & (more_of_b ? ~0u : b.lanes);
  const Time some = std::min(more_of_a ? a.all : a.some, more_of_b ? b.all : b.some);
  return lanes != 0 && some > all ? Known{all, some, lanes} : Known{all, 0, 0};
}

struct Knowledge {
  std::array<Known, kMaxActors> seen;
  // The time up to which a warp's writes through the generic proxy have been made visible to the async proxy.
  std::array<Known, kMaxWarps> fenced;
};

}  // namespace hypenet::emu
