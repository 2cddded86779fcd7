// A mapping alone, without the pass over the streams: matrices [tokens, N, N] of logits [tokens, LOGITS], and the gradient.
#pragma once

namespace mhc {

constexpr int N = STREAMS;
using Real = COMPUTE;
using Mixing = Family<Real, N>;

// work(mixing, first token, number of tokens, scratch memory) for LANES tokens at a time, with their logits in `mixing`.
template <typename Work>
void each_block(const Real* logits, int64_t tokens, int64_t scratch, int64_t threads, Work work) {
    const int64_t blocks = (tokens + LANES - 1) / LANES;
    #pragma omp parallel num_threads(threads) if (threads > 1)
    {
        std::vector<Real> memory(scratch);
        #pragma omp for schedule(static)
        for (int64_t b = 0; b < blocks; ++b) {
            Mixing mixing;
            const int64_t at = b * LANES, count = std::min(LANES, tokens - at);
            for (int64_t lane = 0; lane < LANES; ++lane)
                for (int k = 0; k < Mixing::LOGITS; ++k) mixing.at(k)[lane] = logits[(at + std::min(lane, count - 1)) * Mixing::LOGITS + k];
            work(mixing, at, count, memory.data());
        }
    }
}

static void mapping_forward(const Real* logits, Real* out, int64_t tokens, int64_t iterations, int64_t threads) {
    each_block(logits, tokens, 0, threads, [=](Mixing& mixing, int64_t at, int64_t count, Real*) {
        mixing.forward(iterations);
        store_matrices<Mixing::TURNED>(mixing.m, out + at * N * N, count);
    });
}

static void mapping_backward(const Real* grad, const Real* logits, Real* out, int64_t tokens, int64_t iterations, int64_t threads) {
    each_block(logits, tokens, Mixing::SCRATCH(iterations), threads, [=](Mixing& mixing, int64_t at, int64_t count, Real* scratch) {
        Real g[N][N][LANES];
        load_matrices<Mixing::TURNED>(grad + at * N * N, count, g);
        mixing.backward(g, iterations, scratch);
        for (int64_t lane = 0; lane < count; ++lane)
            for (int k = 0; k < Mixing::LOGITS; ++k) out[(at + lane) * Mixing::LOGITS + k] = mixing.gradient(k, g)[lane];
    });
}

}  // namespace mhc

using mhc::mapping_forward, mhc::mapping_backward;
PACKED(mapping_forward)
PACKED(mapping_backward)
