/* Bit kernels of the xnorized capsule layers (spec capsule_xnor_heads 3 and 8): signs packed in bytes, products by XOR
 * and popcount, and the routing around them. Inference on the CPU in float32.
 *
 * B batch, N input capsules, d <= 127 their dimension, J classes, D their dimension, a multiple of 16. Bit k % 8 of
 * byte k / 8 is set where value k is > 0, so that sgn(0) = -1; bits behind the last value are 0. The products of n
 * signs sum to n - 2 popcount(a XOR b).
 *
 * For GCC and Clang, called through ctypes; no header of Python or torch. What is marked INLINE is compiled once for
 * each path of xnor.h.
 */
#include <stdlib.h>

#include "xnor.h"

#define TILE 8 /* samples that share one pass over the weights */

/* kind       x                     bits and scale                             out
 * PRODUCTS   capsules (B, N, d)    of W (N, ceil(d / 8), J, D), none          sums P (B, N, J, D) int8
 * XNODR      capsules (B, N, d)    of W (N, ceil(d / 8), J, D) and (N, J, D)  v (B, J, D)
 * XNIDR      u_hat (N, B, J, D)    none                                       v (B, J, D)
 * AGREEMENT  v (B, J, D)           of u_hat (B, N, D / 8, J) and (B, N, J)    added to logits (B, N, J)
 */
enum { PRODUCTS, XNODR, XNIDR, AGREEMENT };

struct work {
    int kind;
    const float *x;
    const uint8_t *bits;
    const float *scale;
    void *out;
    size_t batch, capsules, in_dim, classes, dim, iterations;
    uint8_t *signs; /* of capsules (B, N, ceil(d / 8)) */
    float *k;       /* their scales (B, N) */
};

INLINE void pack_capsules(int path, const struct work *w, size_t in_dim, size_t first, size_t last) {
    for (size_t i = first * w->capsules; i < last * w->capsules; i++) {
        pack_signs(path, w->x + i * in_dim, w->signs + i * ((in_dim + 7) / 8), 1, in_dim);
        if (w->kind == XNODR) w->k[i] = mean_abs(w->x + i * in_dim, in_dim);
    }
}

/* P[b,i] (J, D): sums of the products of signs for one sample and input capsule, of which u_hat = P K_x alpha */
INLINE void multiply(int path, const struct work *w, size_t in_dim, size_t b, size_t i, int8_t *p) {
    size_t row = w->classes * w->dim, bytes = (in_dim + 7) / 8;
    const uint8_t *x = w->signs + (b * w->capsules + i) * bytes, *weights = w->bits + i * bytes * row;
    for (size_t q = 0; q < bytes; q++)
        sums(path, weights + q * row, x[q], q + 1 < bytes ? 8 : (int)(in_dim - 8 * q), q > 0, p, row);
}

/* u = k alpha P and c[j] = <u[j], v[j]>; without v nothing but s += u */
INLINE void predict(
        int path, const int8_t *p, float k, const float *alpha, const float *v, float *u, float *c, float *s,
        size_t classes, size_t dim) {
    for (size_t j = 0; j < classes; j++) {
        lanes products = {0};
        for (size_t part = 0; part < dim; part += LANES) {
            size_t e = j * dim + part;
            lanes value;
            widen(path, p + e, &value);
            value *= k * AT_CONST(alpha + e);
            if (v) products += value * AT_CONST(v + e), AT(u + e) = value;
            else AT(s + e) += value;
        }
        if (v) c[j] = total(&products);
    }
}

/* XnODR. Products are made in every iteration anew, (J, D) at a time, and neither they nor logits are kept: logits are
 * <u_hat, sum of the v of all iterations before>. */
INLINE int route_xnodr(int path, const struct work *w, size_t in_dim, size_t dim, size_t first, size_t last) {
    size_t classes = w->classes, row = classes * dim;
    float *u = malloc((row * (1 + 2 * TILE) + classes + LANES) * sizeof(float) + row);
    if (!u) return 1;
    float *c = u + row, *s = c + classes + LANES, *v = s + TILE * row; /* of each sample (J, D): s, sum of all v */
    int8_t *p = (int8_t *)(v + TILE * row);
    for (size_t tile = first; tile < last; tile += TILE) {
        size_t samples = last - tile < TILE ? last - tile : TILE;
        float *out = (float *)w->out + tile * row;
        memset(v, 0, samples * row * sizeof(float));
        for (size_t t = 0; t < w->iterations; t++) {
            memset(s, 0, samples * row * sizeof(float));
            for (size_t i = 0; i < w->capsules; i++)
                for (size_t b = 0; b < samples; b++) {
                    const float k = w->k[(tile + b) * w->capsules + i], *alpha = w->scale + i * row;
                    multiply(path, w, in_dim, tile + b, i, p);
                    if (t) {
                        predict(path, p, k, alpha, v + b * row, u, c, NULL, classes, dim);
                        attend(c, u, s + b * row, classes, dim);
                    } else {
                        predict(path, p, k / (float)classes, alpha, NULL, NULL, NULL, s + b * row, classes, dim);
                    }
                }
            squash(s, out, samples * classes, dim);
            for (size_t e = 0; e < samples * row; e += LANES) AT(v + e) += AT(out + e);
        }
    }
    free(u);
    return 0;
}

/* l[j] += K_u K_v <sgn u, sgn v> for one sample and input capsule, and c[j] = l[j]; signs (D / 8, J) */
INLINE void agree(
        const uint8_t *u, const float *u_scale, const uint8_t *v, const float *v_scale, float *l, float *c,
        size_t classes, size_t dim) {
    size_t j = 0;
    for (; j + LANES <= classes; j += LANES)
        for (size_t at = j; at < j + LANES; at++) {
            int differing = 0;
            for (size_t q = 0; q < dim / 8; q++) differing += ones(u[q * classes + at] ^ v[q * classes + at]);
            c[at] = l[at] += (float)((int)dim - 2 * differing) * (u_scale[at] * v_scale[at]);
        }
    for (; j < classes; j++) {
        int differing = 0;
        for (size_t q = 0; q < dim / 8; q++) differing += __builtin_popcount(u[q * classes + j] ^ v[q * classes + j]);
        c[j] = l[j] += (float)((int)dim - 2 * differing) * (u_scale[j] * v_scale[j]);
    }
}

INLINE void pack_rows(int path, const float *x, uint8_t *bits, float *scale, size_t rows, size_t dim) {
    for (size_t j = 0; j < rows; j++, x += dim) {
        lanes sum = {0};
        pack_signs(path, x, bits + j, rows, dim);
        for (size_t e = 0; e < dim; e += LANES) sum += (lanes)(*(const ints *)(x + e) & 0x7fffffff);
        scale[j] = total(&sum) / (float)dim;
    }
}

/* XnIDR: signs and scales of the predictions are taken once, with the first weighted sum. */
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
                float *u_scale = u_scales + i * classes, *l = logits + i * classes;
                uint8_t *signs = u_bits + i * classes * bytes;
                if (t == 0) {
                    for (size_t e = 0; e < row; e++) s[e] += u[e] / (float)classes;
                    pack_rows(path, u, signs, u_scale, classes, dim);
                } else {
                    agree(signs, u_scale, v_bits, v_scale, l, c, classes, dim);
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

/* What one iteration of XnIDR adds to the logits. */
INLINE int add_agreements(int path, const struct work *w, size_t dim, size_t first, size_t last) {
    size_t classes = w->classes, bytes = dim / 8;
    float *v_scale = malloc(classes * sizeof(float) + classes * bytes);
    if (!v_scale) return 1;
    uint8_t *v_bits = (uint8_t *)(v_scale + classes);
    for (size_t b = first; b < last; b++) {
        pack_rows(path, w->x + b * classes * dim, v_bits, v_scale, classes, dim);
        for (size_t i = b * w->capsules; i < (b + 1) * w->capsules; i++) {
            float *l = (float *)w->out + i * classes;
            agree(w->bits + i * bytes * classes, w->scale + i * classes, v_bits, v_scale, l, l, classes, dim);
        }
    }
    free(v_scale);
    return 0;
}

INLINE int run_sized(int path, const struct work *w, size_t in_dim, size_t dim, size_t first, size_t last) {
    if (w->kind == XNIDR) return route_xnidr(path, w, dim, first, last);
    if (w->kind == AGREEMENT) return add_agreements(path, w, dim, first, last);
    pack_capsules(path, w, in_dim, first, last);
    if (w->kind == XNODR) return route_xnodr(path, w, in_dim, dim, first, last);
    for (size_t i = first * w->capsules; i < last * w->capsules; i++)
        multiply(path, w, in_dim, i / w->capsules, i % w->capsules, (int8_t *)w->out + i * w->classes * dim);
    return 0;
}

/* The papers' 8 and 16 dimensions are constants to the compiler. */
INLINE int run(int path, const struct work *w, size_t first, size_t last) {
    if (w->in_dim == 8 && w->dim == 16) return run_sized(path, w, 8, 16, first, last);
    return run_sized(path, w, w->in_dim, w->dim, first, last);
}

typedef int runner(const struct work *w, size_t first, size_t last);
static int run_portable(const struct work *w, size_t first, size_t last) { return run(PORTABLE, w, first, last); }
TARGET_SIMD static int run_simd(const struct work *w, size_t first, size_t last) { return run(SIMD, w, first, last); }
TARGET_WIDE static int run_wide(const struct work *w, size_t first, size_t last) { return run(WIDE, w, first, last); }
static runner *const RUNNERS[] = {run_portable, run_simd, run_wide};

struct team {
    const struct work *work;
    runner *run;
    size_t shares, next;
    int failed;
};

/* Takes shares of the batch until none is left, for each thread of a team of any size. */
static void run_shares(void *argument) {
    struct team *team = argument;
    size_t batch = team->work->batch;
    for (size_t k; (k = __atomic_fetch_add(&team->next, 1, __ATOMIC_RELAXED)) < team->shares;)
        if (team->run(team->work, batch * k / team->shares, batch * (k + 1) / team->shares))
            __atomic_store_n(&team->failed, 1, __ATOMIC_RELAXED);
}

/* Name of a path of this build that this processor has, the best one last; NULL behind it. */
EXPORT const char *xnor_path(int path) { return path <= best_path() ? PATHS[path] : NULL; }

/* Arguments as in struct work. Returns 0, or 1 if memory ran out. */
EXPORT int xnor_compute_shares(
        int kind, const float *x, const uint8_t *bits, const float *scale, void *out, size_t batch, size_t capsules,
        size_t in_dim, size_t classes, size_t dim, size_t iterations, int path, size_t threads,
        parallel *run_parallel) {
    struct work work = {kind, x, bits, scale, out, batch, capsules, in_dim, classes, dim, iterations, NULL, NULL};
    size_t inputs = batch * capsules;
    work.k = malloc(inputs * sizeof(float) + inputs * ((in_dim + 7) / 8));
    if (!work.k) return 1;
    work.signs = (uint8_t *)(work.k + inputs);
    struct team team = {&work, RUNNERS[path], threads < batch ? threads : batch, 0, 0};
    if (team.shares > 1 && run_parallel) run_parallel(run_shares, &team, (unsigned)team.shares, 0);
    else run_shares(&team);
    free(work.k);
    return team.failed;
}
