// Sinkhorn-Knopp for LANES matrices at a time, one token in each lane of a vector.
//
// Arithmetic and guarantees are those of mhc_compile/mappings/sinkhorn.py: the first round on logarithms, the rest by multiplication; the backward
// keeps only the sums, multiplies back, and is the exact adjoint of the steps as they were run.
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

template <typename T, int N>
struct Block {
    T m[N][N][LANES];        // the matrix, tokens in lanes
    T columns[N][N][LANES];  // after the first column step

    void load(const T* from, int64_t count, T (&to)[N][N][LANES]) const {
        for (int64_t lane = 0; lane < LANES; ++lane) {
            const T* matrix = from + std::min(lane, count - 1) * N * N;
            for (int i = 0; i < N; ++i)
                for (int j = 0; j < N; ++j) to[i][j][lane] = matrix[i * N + j];
        }
    }

    void store(const T (&from)[N][N][LANES], T* to, int64_t count) const {
        for (int64_t lane = 0; lane < count; ++lane)
            for (int i = 0; i < N; ++i)
                for (int j = 0; j < N; ++j) to[lane * N * N + i * N + j] = from[i][j][lane];
    }

    // Columns, then rows, on logarithms.
    void first_round() {
        for (int j = 0; j < N; ++j) {
            T top[LANES], sum[LANES] = {}, inverse[LANES], logarithm[LANES];
            EACH_LANE top[l] = m[0][j][l];
            for (int i = 1; i < N; ++i) EACH_LANE top[l] = std::max(top[l], m[i][j][l]);
            for (int i = 0; i < N; ++i) EACH_LANE { columns[i][j][l] = exp_negative(m[i][j][l] - top[l]); sum[l] += columns[i][j][l]; }
            EACH_LANE inverse[l] = 1 / sum[l];
            for (int64_t l = 0; l < LANES; ++l) logarithm[l] = top[l] + std::log(sum[l]);
            for (int i = 0; i < N; ++i) EACH_LANE { columns[i][j][l] *= inverse[l]; m[i][j][l] -= logarithm[l]; }
        }
        for (int i = 0; i < N; ++i) {
            T top[LANES], sum[LANES] = {}, inverse[LANES];
            EACH_LANE top[l] = m[i][0][l];
            for (int j = 1; j < N; ++j) EACH_LANE top[l] = std::max(top[l], m[i][j][l]);
            for (int j = 0; j < N; ++j) EACH_LANE { m[i][j][l] = exp_negative(m[i][j][l] - top[l]); sum[l] += m[i][j][l]; }
            EACH_LANE inverse[l] = 1 / sum[l];
            for (int j = 0; j < N; ++j) EACH_LANE m[i][j][l] *= inverse[l];
        }
    }

    // One more round by multiplication. `sums` receives the column sums, then the row sums, [2][N][LANES]; null where nobody asks.
    void round(T* sums) {
        for (int j = 0; j < N; ++j) {
            T sum[LANES] = {}, inverse[LANES];
            for (int i = 0; i < N; ++i) EACH_LANE sum[l] += m[i][j][l];
            EACH_LANE inverse[l] = 1 / sum[l];
            for (int i = 0; i < N; ++i) EACH_LANE m[i][j][l] *= inverse[l];
            if (sums) std::memcpy(sums + j * LANES, sum, sizeof sum);
        }
        for (int i = 0; i < N; ++i) {
            T sum[LANES] = {}, inverse[LANES];
            for (int j = 0; j < N; ++j) EACH_LANE sum[l] += m[i][j][l];
            EACH_LANE inverse[l] = 1 / sum[l];
            for (int j = 0; j < N; ++j) EACH_LANE m[i][j][l] *= inverse[l];
            if (sums) std::memcpy(sums + (N + i) * LANES, sum, sizeof sum);
        }
    }

    // The adjoint of one round: g = (g' - <g', m'>) / sum, and m = m' sum, rows first, then columns.
    void round_back(T (&g)[N][N][LANES], const T* sums) {
        for (int i = 0; i < N; ++i) {
            T sum[LANES], inverse[LANES], dot[LANES] = {};
            std::memcpy(sum, sums + (N + i) * LANES, sizeof sum);
            for (int j = 0; j < N; ++j) EACH_LANE dot[l] += g[i][j][l] * m[i][j][l];
            EACH_LANE inverse[l] = 1 / sum[l];
            for (int j = 0; j < N; ++j) EACH_LANE g[i][j][l] = (g[i][j][l] - dot[l]) * inverse[l];
            for (int j = 0; j < N; ++j) EACH_LANE m[i][j][l] *= sum[l];
        }
        for (int j = 0; j < N; ++j) {
            T sum[LANES], inverse[LANES], dot[LANES] = {};
            std::memcpy(sum, sums + j * LANES, sizeof sum);
            for (int i = 0; i < N; ++i) EACH_LANE dot[l] += g[i][j][l] * m[i][j][l];
            EACH_LANE inverse[l] = 1 / sum[l];
            for (int i = 0; i < N; ++i) EACH_LANE g[i][j][l] = (g[i][j][l] - dot[l]) * inverse[l];
            for (int i = 0; i < N; ++i) EACH_LANE m[i][j][l] *= sum[l];
        }
    }

    void first_round_back(T (&g)[N][N][LANES]) {
        for (int i = 0; i < N; ++i) {
            T total[LANES] = {};
            for (int j = 0; j < N; ++j) EACH_LANE { g[i][j][l] *= m[i][j][l]; total[l] += g[i][j][l]; }
            for (int j = 0; j < N; ++j) EACH_LANE g[i][j][l] -= m[i][j][l] * total[l];
        }
        for (int j = 0; j < N; ++j) {
            T total[LANES] = {};
            for (int i = 0; i < N; ++i) EACH_LANE total[l] += g[i][j][l];
            for (int i = 0; i < N; ++i) EACH_LANE g[i][j][l] -= columns[i][j][l] * total[l];
        }
    }
};

template <typename T, int N>
void sinkhorn_all(const T* logits, T* out, int64_t tokens, int64_t iterations, int64_t threads) {
    const int64_t blocks = (tokens + LANES - 1) / LANES;
    #pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t b = 0; b < blocks; ++b) {
        Block<T, N> block;
        const int64_t at = b * LANES, count = std::min(LANES, tokens - at);
        block.load(logits + at * N * N, count, block.m);
        block.first_round();
        for (int64_t k = 1; k < iterations; ++k) block.round(nullptr);
        block.store(block.m, out + at * N * N, count);
    }
}

template <typename T, int N>
void sinkhorn_all_backward(const T* grad, const T* logits, T* out, int64_t tokens, int64_t iterations, int64_t threads) {
    const int64_t blocks = (tokens + LANES - 1) / LANES;
    #pragma omp parallel num_threads(threads) if (threads > 1)
    {
        std::vector<T> sums((iterations - 1) * 2 * N * LANES);
        #pragma omp for schedule(static)
        for (int64_t b = 0; b < blocks; ++b) {
            Block<T, N> block;
            T g[N][N][LANES];
            const int64_t at = b * LANES, count = std::min(LANES, tokens - at);
            block.load(logits + at * N * N, count, block.m);
            block.load(grad + at * N * N, count, g);
            block.first_round();
            for (int64_t k = 1; k < iterations; ++k) block.round(sums.data() + (k - 1) * 2 * N * LANES);
            for (int64_t k = iterations - 1; k > 0; --k) block.round_back(g, sums.data() + (k - 1) * 2 * N * LANES);
            block.first_round_back(g);
            block.store(g, out + at * N * N, count);
        }
    }
}

}  // namespace mhc

#ifdef SINKHORN_ALONE
#define EXPORT extern "C" __attribute__((visibility("default")))
EXPORT void sinkhorn_forward(const COMPUTE* a, COMPUTE* out, int64_t tokens, int64_t iterations, int64_t threads) {
    mhc::sinkhorn_all<COMPUTE, STREAMS>(a, out, tokens, iterations, threads);
}
EXPORT void sinkhorn_backward(const COMPUTE* g, const COMPUTE* a, COMPUTE* out, int64_t tokens, int64_t iterations, int64_t threads) {
    mhc::sinkhorn_all_backward<COMPUTE, STREAMS>(g, a, out, tokens, iterations, threads);
}
#endif
