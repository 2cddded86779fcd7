// Sinkhorn-Knopp for LANES matrices at a time.
//
// Arithmetic and guarantees are those of mhc_compile/mappings/sinkhorn.py: the first round on logarithms, the rest by multiplication; the backward
// keeps only the sums, multiplies back, and is the exact adjoint of the steps as they were run. With SINKHORN_EPS the first round is a softmax over
// columns plus that, and every sum that is divided by has it added. With LAST_COLUMNS all is done on the transposed matrices.
#pragma once

namespace mhc {

template <typename T, int N>
struct Family {
    static constexpr int LOGITS = N * N;
    static constexpr bool TURNED = LAST_COLUMNS;
    static constexpr T EPS = SINKHORN_EPS;
    T m[N][N][LANES];
    T columns[N][N][LANES];  // after the first column step, without eps
    T rows[N][LANES];        // with eps, what the first row step divides by

    static int64_t SCRATCH(int64_t iterations) { return iterations * 2 * N * LANES; }
    T* at(int k) { return TURNED ? m[k % N][k / N] : m[k / N][k % N]; }
    const T* gradient(int k, const T (&g)[N][N][LANES]) const { return TURNED ? g[k % N][k / N] : g[k / N][k % N]; }

    void forward(int64_t iterations) {
        first_round();
        for (int64_t k = 1; k < iterations; ++k) round(nullptr);
    }

    // `history` receives the sums of every round but the first.
    void backward(T (&g)[N][N][LANES], int64_t iterations, T* history) {
        first_round();
        for (int64_t k = 1; k < iterations; ++k) round(history + (k - 1) * 2 * N * LANES);
        for (int64_t k = iterations - 1; k > 0; --k) {
            const T* sums = history + (k - 1) * 2 * N * LANES;
            step_back<false>(g, sums + N * LANES);
            step_back<true>(g, sums);
        }
        first_round_back(g);
    }

  private:
    // Entry k of row `line`, or of column `line`.
    template <bool COLUMN, typename Matrix>
    static auto& entry(Matrix& x, int line, int k) { return COLUMN ? x[k][line] : x[line][k]; }

    // Columns, then rows, on logarithms; with eps no sum can vanish, and they are not needed.
    void first_round() {
        for (int j = 0; j < N; ++j) {
            T top[LANES], sum[LANES] = {}, inverse[LANES];
            [[maybe_unused]] T logarithm[LANES];
            EACH_LANE top[l] = m[0][j][l];
            for (int i = 1; i < N; ++i) EACH_LANE top[l] = std::max(top[l], m[i][j][l]);
            for (int i = 0; i < N; ++i) EACH_LANE { columns[i][j][l] = exp_negative(m[i][j][l] - top[l]); sum[l] += columns[i][j][l]; }
            EACH_LANE inverse[l] = 1 / sum[l];
            if constexpr (EPS == 0) {
                for (int64_t l = 0; l < LANES; ++l) logarithm[l] = top[l] + std::log(sum[l]);
                for (int i = 0; i < N; ++i) EACH_LANE { columns[i][j][l] *= inverse[l]; m[i][j][l] -= logarithm[l]; }
            } else {
                for (int i = 0; i < N; ++i) EACH_LANE { columns[i][j][l] *= inverse[l]; m[i][j][l] = columns[i][j][l] + EPS; }
            }
        }
        if constexpr (EPS != 0) return step<false>(rows[0]);
        for (int i = 0; i < N; ++i) softmax(m[i]);
    }

    // One more round by multiplication. `sums` receives the column sums, then the row sums, [2][N][LANES]; null where nobody asks.
    void round(T* sums) {
        step<true>(sums);
        step<false>(sums ? sums + N * LANES : nullptr);
    }

    template <bool COLUMN>
    void step(T* sums) {
        for (int line = 0; line < N; ++line) {
            T sum[LANES] = {}, inverse[LANES];
            for (int k = 0; k < N; ++k) EACH_LANE sum[l] += entry<COLUMN>(m, line, k)[l];
            if constexpr (EPS != 0) EACH_LANE sum[l] += EPS;
            EACH_LANE inverse[l] = 1 / sum[l];
            for (int k = 0; k < N; ++k) EACH_LANE entry<COLUMN>(m, line, k)[l] *= inverse[l];
            if (sums) std::memcpy(sums + line * LANES, sum, sizeof sum);
        }
    }

    // The adjoint of one step: g = (g' - <g', m'>) / sum, and m = m' sum.
    template <bool COLUMN>
    void step_back(T (&g)[N][N][LANES], const T* sums) {
        for (int line = 0; line < N; ++line) {
            T sum[LANES], inverse[LANES], dot[LANES] = {};
            std::memcpy(sum, sums + line * LANES, sizeof sum);
            for (int k = 0; k < N; ++k) EACH_LANE dot[l] += entry<COLUMN>(g, line, k)[l] * entry<COLUMN>(m, line, k)[l];
            EACH_LANE inverse[l] = 1 / sum[l];
            for (int k = 0; k < N; ++k) EACH_LANE entry<COLUMN>(g, line, k)[l] = (entry<COLUMN>(g, line, k)[l] - dot[l]) * inverse[l];
            for (int k = 0; k < N; ++k) EACH_LANE entry<COLUMN>(m, line, k)[l] *= sum[l];
        }
    }

    void first_round_back(T (&g)[N][N][LANES]) {
        for (int i = 0; i < N; ++i) {
            T total[LANES] = {};
            if constexpr (EPS == 0) {
                for (int j = 0; j < N; ++j) EACH_LANE { g[i][j][l] *= m[i][j][l]; total[l] += g[i][j][l]; }
                for (int j = 0; j < N; ++j) EACH_LANE g[i][j][l] -= m[i][j][l] * total[l];
            } else {
                for (int j = 0; j < N; ++j) EACH_LANE total[l] += g[i][j][l] * m[i][j][l];
                for (int j = 0; j < N; ++j) EACH_LANE g[i][j][l] = columns[i][j][l] * (g[i][j][l] - total[l]) / rows[i][l];
            }
        }
        for (int j = 0; j < N; ++j) {
            T total[LANES] = {};
            for (int i = 0; i < N; ++i) EACH_LANE total[l] += g[i][j][l];
            for (int i = 0; i < N; ++i) EACH_LANE g[i][j][l] -= columns[i][j][l] * total[l];
        }
    }
};

}  // namespace mhc
