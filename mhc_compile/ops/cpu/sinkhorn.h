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
        for (int64_t k = iterations - 1; k > 0; --k) round_back(g, history + (k - 1) * 2 * N * LANES);
        first_round_back(g);
    }

  private:
    static void plus_eps(T (&sum)[LANES]) {
        if constexpr (EPS != 0) EACH_LANE sum[l] += EPS;
    }

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
        if constexpr (EPS != 0) return row_step(rows[0]);
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
            plus_eps(sum);
            EACH_LANE inverse[l] = 1 / sum[l];
            for (int i = 0; i < N; ++i) EACH_LANE m[i][j][l] *= inverse[l];
            if (sums) std::memcpy(sums + j * LANES, sum, sizeof sum);
        }
        row_step(sums ? sums + N * LANES : nullptr);
    }

    void row_step(T* sums) {
        for (int i = 0; i < N; ++i) {
            T sum[LANES] = {}, inverse[LANES];
            for (int j = 0; j < N; ++j) EACH_LANE sum[l] += m[i][j][l];
            plus_eps(sum);
            EACH_LANE inverse[l] = 1 / sum[l];
            for (int j = 0; j < N; ++j) EACH_LANE m[i][j][l] *= inverse[l];
            if (sums) std::memcpy(sums + i * LANES, sum, sizeof sum);
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
