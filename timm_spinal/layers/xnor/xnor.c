/* Inference of the xnorized capsule layers with bits: signs packed in bytes, their products by XOR and popcount, and
 * the dynamic routing around them, in float32 on the CPU (the equations stand in ../capsule_routing.py).
 *
 * B batch, N input capsules, d <= 127 their dimension, J classes, D their dimension, a multiple of LANES. Bit k % 8 of
 * byte k / 8 is set where value k is > 0, so that sgn(0) = -1; bits behind the last value are 0. The products of n
 * signs sum to n - 2 popcount(a XOR b).
 *
 * Plain C for GCC and Clang, called through ctypes: no header of Python or torch. Functions marked INLINE are compiled
 * once for each path: portable C, and AVX2 (called where the processor has it) or NEON.
 */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define EXPORT __attribute__((visibility("default")))
#define LANES 8
#define TILE 8 /* samples that share one pass over the weights */

/* memory need not be aligned */
typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
#define AT(x) (*(lanes *)(x))
#define AT_CONST(x) (*(const lanes *)(x))

enum { PORTABLE, SIMD };

/* kind      x                    bits                              scale      out
 * PRODUCTS  capsules (B, N, d)   of W, (N, ceil(d / 8), J, D)      none       (sgn x)(sgn W), (B, N, J, D) int8
 * XNODR     capsules (B, N, d)   of W, (N, ceil(d / 8), J, D)      (N, J, D)  v (B, J, D)
 * XNIDR     u_hat (N, B, J, D)   none                              none       v (B, J, D)
 */
enum { PRODUCTS, XNODR, XNIDR };

struct work {
    int kind;
    const float *x;
    const uint8_t *bits;
    const float *scale;
    void *out;
    size_t batch, capsules, in_dim, classes, dim, iterations;
};

/* ---- signs and their products, by path ---- */

INLINE int ones(uint8_t v) {
    v = (uint8_t)(v - ((v >> 1) & 0x55));
    v = (uint8_t)((v & 0x33) + ((v >> 2) & 0x33));
    return (v + (v >> 4)) & 0x0f;
}

/* p[e] = n - 2 popcount(w[e] XOR x), the sum of the products of n <= 8 signs; where `add` is set, added to p[e] */
INLINE void sums_portable(const uint8_t *restrict w, uint8_t x, int n, int add, int8_t *restrict p, size_t size) {
    for (size_t e = 0; e < size; e++) p[e] = (int8_t)((add ? p[e] : 0) + n - 2 * ones(w[e] ^ x));
}

/* 8 values to a byte */
INLINE uint8_t signs8_portable(const float *x) {
    unsigned bits = 0;
    for (int k = 0; k < 8; k++) bits |= (unsigned)(x[k] > 0.f) << k;
    return (uint8_t)bits;
}

#if defined(__x86_64__)
#include <immintrin.h>
#define TARGET_SIMD __attribute__((target("avx2,fma")))

TARGET_SIMD static inline void sums_simd(
        const uint8_t *restrict w, uint8_t x, int n, int add, int8_t *restrict p, size_t size) {
    /* -2 popcount of each nibble */
    const __m256i table = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, -2, -2, -4, -2, -4, -4, -6, -2, -4, -4, -6, -4, -6, -6, -8));
    const __m256i low = _mm256_set1_epi8(15), signs = _mm256_set1_epi8((char)x), all = _mm256_set1_epi8((char)n);
    size_t e = 0;
    for (; e + 32 <= size; e += 32) {
        __m256i *to = (__m256i *)(p + e), v = _mm256_xor_si256(_mm256_loadu_si256((const __m256i *)(w + e)), signs);
        __m256i sum = _mm256_add_epi8(all, _mm256_shuffle_epi8(table, _mm256_and_si256(v, low)));
        sum = _mm256_add_epi8(sum, _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(v, 4), low)));
        _mm256_storeu_si256(to, add ? _mm256_add_epi8(_mm256_loadu_si256(to), sum) : sum);
    }
    sums_portable(w + e, x, n, add, p + e, size - e);
}

TARGET_SIMD static inline uint8_t signs8_simd(const float *x) {
    return (uint8_t)_mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(x), _mm256_setzero_ps(), _CMP_GT_OQ));
}

static const char *const PATHS[] = {"portable", "avx2"};

static int best_path(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? SIMD : PORTABLE;
}
#elif defined(__aarch64__)
#include <arm_neon.h>
#define TARGET_SIMD

INLINE void sums_simd(const uint8_t *restrict w, uint8_t x, int n, int add, int8_t *restrict p, size_t size) {
    size_t e = 0;
    for (; e + 16 <= size; e += 16) {
        int8x16_t count = vreinterpretq_s8_u8(vcntq_u8(veorq_u8(vld1q_u8(w + e), vdupq_n_u8(x))));
        int8x16_t sum = vsubq_s8(vdupq_n_s8((int8_t)n), vaddq_s8(count, count));
        vst1q_s8(p + e, add ? vaddq_s8(vld1q_s8(p + e), sum) : sum);
    }
    sums_portable(w + e, x, n, add, p + e, size - e);
}

INLINE uint8_t signs8_simd(const float *x) {
    static const uint32_t places[8] = {1, 2, 4, 8, 16, 32, 64, 128};
    uint32x4_t a = vandq_u32(vcgtq_f32(vld1q_f32(x), vdupq_n_f32(0.f)), vld1q_u32(places));
    uint32x4_t b = vandq_u32(vcgtq_f32(vld1q_f32(x + 4), vdupq_n_f32(0.f)), vld1q_u32(places + 4));
    return (uint8_t)vaddvq_u32(vaddq_u32(a, b));
}

static const char *const PATHS[] = {"portable", "neon"};

static int best_path(void) { return SIMD; }
#else
#define TARGET_SIMD
#define sums_simd sums_portable
#define signs8_simd signs8_portable

static const char *const PATHS[] = {"portable"};

static int best_path(void) { return PORTABLE; }
#endif

/* n values to bytes, each `stride` behind the one before */
INLINE void pack_signs(int path, const float *x, uint8_t *bytes, size_t stride, size_t n) {
    for (size_t k = 0; k < n; k += 8, bytes += stride) {
        float tail[8] = {0};
        if (n - k < 8) memcpy(tail, x + k, (n - k) * sizeof(float));
        const float *from = n - k < 8 ? tail : x + k;
        *bytes = path == SIMD ? signs8_simd(from) : signs8_portable(from);
    }
}

/* P (J, D): sums of the products of signs for one sample and input capsule, of which u_hat = P K_x alpha */
INLINE void multiply(int path, const uint8_t *x, const uint8_t *w, size_t in_dim, int8_t *p, size_t row) {
    for (size_t k = 0; k < in_dim; k += 8, x++, w += row) {
        int n = in_dim - k < 8 ? (int)(in_dim - k) : 8;
        if (path == SIMD) sums_simd(w, *x, n, k > 0, p, row);
        else sums_portable(w, *x, n, k > 0, p, row);
    }
}

/* ---- the rest of dynamic routing, in floats ---- */

INLINE float total(lanes x) {
    return ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
}

INLINE lanes greater(lanes a, lanes b) {
    ints more = b > a;
    return (lanes)(((ints)b & more) | ((ints)a & ~more));
}

INLINE float mean_abs(const float *x, size_t size) {
    float sums[4] = {0}; /* so that an addition does not wait for the one before */
    for (size_t e = 0; e < size; e++) sums[e % 4] += fabsf(x[e]);
    return ((sums[0] + sums[1]) + (sums[2] + sums[3])) / (float)size;
}

/* e^x for x <= 0: 2^n by the bits of the exponent, e^r by a polynomial (that of Cephes' expf) */
INLINE lanes exp_negative(lanes x) {
    x = greater(x, (lanes){0} - 87.f);
    ints whole = __builtin_convertvector(x * 1.44269504f - .5f, ints);
    lanes n = __builtin_convertvector(whole, lanes), r = x - n * .693359375f + n * 2.12194440e-4f;
    lanes p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return (p * r * r + r + 1.f) * (lanes)((whole + 127) << 23);
}

/* s[j] += softmax(l)[j] u[j], for logits l that have space for a multiple of LANES and are overwritten */
INLINE void attend(float *l, const float *u, float *s, size_t classes, size_t dim) {
    for (size_t j = classes; j % LANES; j++) l[j] = -INFINITY;
    lanes greatest = AT(l), sums = {0};
    for (size_t j = LANES; j < classes; j += LANES) greatest = greater(greatest, AT(l + j));
    float max = greatest[0];
    for (size_t k = 1; k < LANES; k++) max = greatest[k] > max ? greatest[k] : max;
    for (size_t j = 0; j < classes; j += LANES) {
        AT(l + j) = exp_negative(AT(l + j) - max);
        sums += AT(l + j);
    }
    float divisor = 1.f / total(sums);
    for (size_t j = 0; j < classes; j++, u += dim, s += dim)
        for (size_t e = 0; e < dim; e += LANES) AT(s + e) += divisor * l[j] * AT_CONST(u + e);
}

INLINE void squash(const float *s, float *v, size_t classes, size_t dim) {
    for (size_t j = 0; j < classes; j++, s += dim, v += dim) {
        lanes squares = {0};
        for (size_t e = 0; e < dim; e += LANES) squares += AT_CONST(s + e) * AT_CONST(s + e);
        float square = total(squares), factor = sqrtf(square) / (1.f + square);
        for (size_t e = 0; e < dim; e += LANES) AT(v + e) = AT_CONST(s + e) * factor;
    }
}

/* ---- XnODR ---- */

/* s += k alpha P, the first iteration, where the coupling is uniform */
INLINE void add_predictions(
        const int8_t *restrict p, float k, const float *restrict alpha, float *restrict s, size_t row) {
    for (size_t e = 0; e < row; e++) s[e] += (float)p[e] * (k * alpha[e]);
}

/* u = k alpha P, and l[j] = <u[j], v[j]> */
INLINE void predict(
        const int8_t *restrict p, float k, const float *restrict alpha, const float *v, float *restrict u, float *l,
        size_t classes, size_t dim) {
    for (size_t e = 0; e < classes * dim; e++) u[e] = (float)p[e] * (k * alpha[e]);
    for (size_t j = 0; j < classes; j++, u += dim, v += dim) {
        lanes products = {0};
        for (size_t e = 0; e < dim; e += LANES) products += AT_CONST(u + e) * AT_CONST(v + e);
        l[j] = total(products);
    }
}

/* Products are made in every iteration anew, (J, D) at a time, and neither they nor logits are kept: logits are
 * <u_hat, sum of the v of all iterations before>. */
INLINE int route_xnodr(int path, const struct work *w, size_t in_dim, size_t dim, size_t first, size_t last) {
    size_t classes = w->classes, row = classes * dim, bytes = (in_dim + 7) / 8, inputs = TILE * w->capsules;
    float *u = malloc((row * (1 + 2 * TILE) + classes + LANES + inputs) * sizeof(float) + row + inputs * bytes);
    if (!u) return 1;
    float *l = u + row, *s = l + classes + LANES, *v = s + TILE * row; /* of each sample (J, D): s, sum of all v */
    float *k = v + TILE * row;                                         /* scales of its capsules */
    int8_t *p = (int8_t *)(k + inputs);
    uint8_t *signs = (uint8_t *)(p + row);
    for (size_t tile = first; tile < last; tile += TILE) {
        size_t samples = last - tile < TILE ? last - tile : TILE;
        const float *x = w->x + tile * w->capsules * in_dim;
        float *out = (float *)w->out + tile * row;
        for (size_t i = 0; i < samples * w->capsules; i++) {
            pack_signs(path, x + i * in_dim, signs + i * bytes, 1, in_dim);
            k[i] = mean_abs(x + i * in_dim, in_dim);
        }
        memset(v, 0, samples * row * sizeof(float));
        for (size_t t = 0; t < w->iterations; t++) {
            memset(s, 0, samples * row * sizeof(float));
            for (size_t i = 0; i < w->capsules; i++)
                for (size_t b = 0; b < samples; b++) {
                    const float *alpha = w->scale + i * row;
                    size_t at = b * w->capsules + i;
                    multiply(path, signs + at * bytes, w->bits + i * bytes * row, in_dim, p, row);
                    if (t == 0) {
                        add_predictions(p, k[at] / (float)classes, alpha, s + b * row, row);
                    } else {
                        predict(p, k[at], alpha, v + b * row, u, l, classes, dim);
                        attend(l, u, s + b * row, classes, dim);
                    }
                }
            squash(s, out, samples * classes, dim);
            for (size_t e = 0; e < samples * row; e += LANES) AT(v + e) += AT(out + e);
        }
    }
    free(u);
    return 0;
}

INLINE int write_products(int path, const struct work *w, size_t in_dim, size_t dim, size_t first, size_t last) {
    size_t row = w->classes * dim, bytes = (in_dim + 7) / 8;
    uint8_t signs[16];
    for (size_t i = first * w->capsules; i < last * w->capsules; i++) {
        pack_signs(path, w->x + i * in_dim, signs, 1, in_dim);
        multiply(path, signs, w->bits + i % w->capsules * bytes * row, in_dim, (int8_t *)w->out + i * row, row);
    }
    return 0;
}

/* ---- XnIDR ---- */

/* l[j] += K_u K_v <sgn u, sgn v> for one sample and input capsule, and c[j] = l[j]; signs (D / 8, J) */
INLINE void agree(
        const uint8_t *u, const float *u_scale, const uint8_t *v, const float *v_scale, float *l, float *c,
        size_t classes, size_t dim) {
    for (size_t j = 0; j < classes; j++) {
        int differing = 0;
        for (size_t q = 0; q < dim / 8; q++) differing += ones(u[q * classes + j] ^ v[q * classes + j]);
        c[j] = l[j] += (float)((int)dim - 2 * differing) * (u_scale[j] * v_scale[j]);
    }
}

INLINE void pack_rows(int path, const float *x, uint8_t *bits, float *scale, size_t rows, size_t dim) {
    for (size_t j = 0; j < rows; j++, x += dim) {
        lanes sum = {0};
        pack_signs(path, x, bits + j, rows, dim);
        for (size_t e = 0; e < dim; e += LANES) sum += (lanes)(*(const ints *)(x + e) & 0x7fffffff);
        scale[j] = total(sum) / (float)dim;
    }
}

/* Signs and scales of the predictions are taken once, with the first weighted sum. */
INLINE int route_xnidr(int path, const struct work *w, size_t dim, size_t first, size_t last) {
    size_t classes = w->classes, row = classes * dim, edges = w->capsules * classes, bytes = dim / 8;
    float *s = malloc((row + 2 * classes + LANES + 2 * edges) * sizeof(float) + (edges + classes) * bytes);
    if (!s) return 1;
    float *c = s + row, *v_scale = c + classes + LANES, *u_scales = v_scale + classes, *logits = u_scales + edges;
    uint8_t *u_bits = (uint8_t *)(logits + edges), *v_bits = u_bits + edges * bytes;
    for (size_t b = first; b < last; b++) {
        float *v = (float *)w->out + b * row;
        memset(logits, 0, edges * sizeof(float));
        for (size_t t = 0; t < w->iterations; t++) {
            memset(s, 0, row * sizeof(float));
            for (size_t i = 0; i < w->capsules; i++) {
                const float *u = w->x + (i * w->batch + b) * row;
                float *u_scale = u_scales + i * classes;
                uint8_t *signs = u_bits + i * classes * bytes;
                if (t == 0) {
                    for (size_t e = 0; e < row; e++) s[e] += u[e] / (float)classes;
                    pack_rows(path, u, signs, u_scale, classes, dim);
                } else {
                    agree(signs, u_scale, v_bits, v_scale, logits + i * classes, c, classes, dim);
                    attend(c, u, s, classes, dim);
                }
            }
            squash(s, v, classes, dim);
            pack_rows(path, v, v_bits, v_scale, classes, dim);
        }
    }
    free(s);
    return 0;
}

/* ---- what is called ---- */

INLINE int run_sized(int path, const struct work *w, size_t in_dim, size_t dim, size_t first, size_t last) {
    if (w->kind == XNIDR) return route_xnidr(path, w, dim, first, last);
    if (w->kind == XNODR) return route_xnodr(path, w, in_dim, dim, first, last);
    return write_products(path, w, in_dim, dim, first, last);
}

/* The papers' 8 and 16 dimensions are constants to the compiler. */
INLINE int run(int path, const struct work *w, size_t first, size_t last) {
    if (w->in_dim == 8 && w->dim == 16) return run_sized(path, w, 8, 16, first, last);
    return run_sized(path, w, w->in_dim, w->dim, first, last);
}

static int run_portable(const struct work *w, size_t first, size_t last) { return run(PORTABLE, w, first, last); }
TARGET_SIMD static int run_simd(const struct work *w, size_t first, size_t last) { return run(SIMD, w, first, last); }

/* Name of a path of this build that this processor has, the best one last; NULL behind it. */
EXPORT const char *xnor_path(int path) { return path <= best_path() ? PATHS[path] : NULL; }

/* Computes samples first .. last - 1. Arguments as in struct work. Returns 0, or 1 if memory ran out. */
EXPORT int xnor_run(
        int path, int kind, const float *x, const uint8_t *bits, const float *scale, void *out, size_t batch,
        size_t capsules, size_t in_dim, size_t classes, size_t dim, size_t iterations, size_t first, size_t last) {
    struct work work = {kind, x, bits, scale, out, batch, capsules, in_dim, classes, dim, iterations};
    return path == SIMD ? run_simd(&work, first, last) : run_portable(&work, first, last);
}
