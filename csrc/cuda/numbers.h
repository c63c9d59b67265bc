// Constants of several kernels.
#pragma once

namespace hypenet::cuda {

constexpr float kLog2E = 1.44269504088896340736f, kLn2 = 0.69314718055994530942f;
constexpr float kMinLogDecay = -50.0f;  // log decays below count as this

}  // namespace hypenet::cuda
