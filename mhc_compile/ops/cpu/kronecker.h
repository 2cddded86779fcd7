// H_res = U_1 (x) ... (x) U_K, U_k = [[p_k, q_k], [q_k, p_k]], (p_k, q_k) = softmax(z_k). H[i, j] = h[i xor j], where h is the first row; U_1
// has the highest bit. With g the gradient of H, that of h is sum_i g[i, i xor j].
#pragma once

namespace mhc {

constexpr int log2(int n) { return n < 2 ? 0 : 1 + log2(n / 2); }

template <typename T, int N>
struct Family {
    static_assert((N & (N - 1)) == 0, "kronecker is for powers of two");
    static constexpr int FACTORS = log2(N), LOGITS = 2 * FACTORS;
    static constexpr bool TURNED = false;
    T m[N][N][LANES], z[FACTORS + (N == 1)][2][LANES], u[FACTORS + (N == 1)][2][LANES];

    static int64_t SCRATCH(int64_t) { return 0; }
    T* at(int k) { return z[k / 2][k % 2]; }
    const T* gradient(int k, const T (&)[N][N][LANES]) const { return u[k / 2][k % 2]; }

    void forward(int64_t) {
        for (int k = 0; k < FACTORS; ++k) softmax(z[k]);
        for (int j = 0; j < N; ++j) {
            T h[LANES];
            product(j, -1, h);
            for (int i = 0; i < N; ++i) std::memcpy(m[i][i ^ j], h, sizeof h);
        }
    }

    void backward(T (&g)[N][N][LANES], int64_t, T*) {
        for (int k = 0; k < FACTORS; ++k) softmax(z[k]);
        std::memset(u, 0, sizeof u);
        for (int j = 0; j < N; ++j) {
            T total[LANES];
            EACH_LANE total[l] = g[0][j][l];
            for (int i = 1; i < N; ++i) EACH_LANE total[l] += g[i][i ^ j][l];
            for (int k = 0; k < FACTORS; ++k) {
                T others[LANES];
                product(j, k, others);
                EACH_LANE u[k][side(j, k)][l] += total[l] * others[l];
            }
        }
        for (int k = 0; k < FACTORS; ++k) softmax_back(z[k], u[k]);
    }

  private:
    // Which of p and q of factor k is in h[j].
    static constexpr int side(int j, int k) { return j >> (FACTORS - 1 - k) & 1; }

    // h[j] without the factor `left_out`.
    void product(int j, int left_out, T (&out)[LANES]) const {
        EACH_LANE out[l] = 1;
        for (int k = 0; k < FACTORS; ++k)
            if (k != left_out) EACH_LANE out[l] *= z[k][side(j, k)][l];
    }
};

}  // namespace mhc
