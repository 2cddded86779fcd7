// Numbers of LANES tokens at a time, one token in each lane of a vector, and what every mapping is made of.
//
// A mapping is a header that defines Family<T, N>, which holds the matrices of LANES tokens:
//
//     LOGITS, SCRATCH(iterations)      how many logits it takes, and how many numbers of scratch memory its backward
//     at(k)                            [LANES], where the k-th logit is to be written before either direction
//     forward(iterations)              m from the logits
//     backward(g, iterations, scratch) the gradients of the logits from g, which is that of m; g may be overwritten
//     gradient(k, g)                   [LANES], where backward left that of the k-th logit
//     m                                [N][N][LANES]; both m and g hold the transposed matrices if TURNED
//
// Semantics: the mapping of the same name in mhc_compile/mappings. Lanes without a token must hold finite numbers.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace mhc {

constexpr int64_t LANES = 16;
#define EACH_LANE _Pragma("omp simd") for (int64_t l = 0; l < LANES; ++l)

// exp for x <= 0, relative error 2e-7; underflows to 0 below -87. Cody-Waite reduction, minimax polynomial of degree 6, branch-free so that it
// vectorises. std::exp would be a call per element.
inline float exp_negative(float x) {
    const float clamped = std::max(x, -88.0f);
    const float k = std::nearbyint(clamped * 1.44269504f);
    const float r = std::fma(k, -1.42860677e-6f, std::fma(k, -0.693145752f, clamped));
    float p = 1.39853062e-3f;
    p = std::fma(p, r, 8.33452941e-3f);
    p = std::fma(p, r, 4.16665795e-2f);
    p = std::fma(p, r, 1.66666546e-1f);
    p = std::fma(p, r, 5.0e-1f);
    p = std::fma(p, r, 1.0f);
    p = std::fma(p, r, 1.0f);
    const int32_t bits = (static_cast<int32_t>(k) + 127) << 23;
    float scale;
    std::memcpy(&scale, &bits, sizeof scale);
    return x < -87.0f ? 0.0f : p * scale;
}

inline double exp_negative(double x) { return std::exp(x); }

// [count, N, N] in memory to lanes and back, transposed if TURNED. Lanes behind the last token repeat it.
template <bool TURNED, typename T, int N>
inline void load_matrices(const T* from, int64_t count, T (&to)[N][N][LANES]) {
    for (int64_t lane = 0; lane < LANES; ++lane) {
        const T* matrix = from + std::min(lane, count - 1) * N * N;
        for (int i = 0; i < N; ++i)
            for (int j = 0; j < N; ++j) (TURNED ? to[j][i] : to[i][j])[lane] = matrix[i * N + j];
    }
}

template <bool TURNED, typename T, int N>
inline void store_matrices(const T (&from)[N][N][LANES], T* to, int64_t count) {
    for (int64_t lane = 0; lane < count; ++lane)
        for (int i = 0; i < N; ++i)
            for (int j = 0; j < N; ++j) to[lane * N * N + i * N + j] = (TURNED ? from[j][i] : from[i][j])[lane];
}

// A softmax over the first axis of z, and its adjoint: z holds the weights, u their gradient and then that of the logits.
template <typename T, int MANY>
inline void softmax(T (&z)[MANY][LANES]) {
    T top[LANES], sum[LANES] = {}, inverse[LANES];
    EACH_LANE top[l] = z[0][l];
    for (int k = 1; k < MANY; ++k) EACH_LANE top[l] = std::max(top[l], z[k][l]);
    for (int k = 0; k < MANY; ++k) EACH_LANE { z[k][l] = exp_negative(z[k][l] - top[l]); sum[l] += z[k][l]; }
    EACH_LANE inverse[l] = 1 / sum[l];
    for (int k = 0; k < MANY; ++k) EACH_LANE z[k][l] *= inverse[l];
}

template <typename T, int MANY>
inline void softmax_back(const T (&z)[MANY][LANES], T (&u)[MANY][LANES]) {
    T dot[LANES] = {};
    for (int k = 0; k < MANY; ++k) EACH_LANE dot[l] += z[k][l] * u[k][l];
    for (int k = 0; k < MANY; ++k) EACH_LANE u[k][l] = z[k][l] * (u[k][l] - dot[l]);
}

}  // namespace mhc
