/* A convolution over a basis whose unique filters are few, with its norms (spec shared_basis 1.1 and 8.1 a), for
 * inference on an x86-64 CPU with AVX-512 in float32:
 *
 *     y = A' . [U * x; z] + b'    A' = diag(g2) A diag(g),  b' = g2 (A h) + h2
 *
 * and what a residual block does with y: add a shortcut, ReLU. z are the outputs of the shared filters; g, h and g2, h2
 * scale and shift of the norms. Convolutions compute 16 filters
 * at a time, so U * x is a matrix product with every tap of U, P = taps . x, whose columns are added where they belong.
 *
 * Called through ctypes; no header of Python or torch.
 */
#include <math.h>

#include "vectors.h"

#if defined(__x86_64__)
#define TARGET __attribute__((target("avx2,fma,avx512f")))
#define ROWS 6   /* pixels at a time, so that ROWS * MOST sums stay in registers */
#define MOST 4   /* vectors of columns at a time */
#define AHEAD 4  /* blocks of ROWS that memory is asked for beforehand */
#define UNIQUE 8 /* filters at most */

struct work {
    const float *x;      /* (batch, height, width, chs) */
    const float *z;      /* (batch, height, width, shared) */
    const float *unique; /* U (filters, chs, kernel, kernel), channels last or not */
    const float *coeff;  /* A (out_chs, filters + shared) */
    const float *const *norms; /* weight, bias, mean, variance of the basis' norm, then of the convolution's; or b' alone */
    const float *shortcut; /* as out, or NULL */
    float *space;          /* for parts */
    float *out;            /* (batch, height, width, out_chs) */
    size_t batch, height, width, chs, kernel, dilation, filters, shared, out_chs, columns, unique_chs, unique_tap; /* the last two are strides of U */
    int normed, relu; /* whether there are norms, a ReLU */
    float eps, eps2;
};

struct parts {
    float *taps, *products, *coeff, *bias, *scale, *shift, *scale2, *shift2;
};

static struct parts split(const struct work *w) {
    size_t rank = w->filters + w->shared;
    struct parts s;
    s.taps = w->space;
    s.products = s.taps + w->chs * w->columns;
    s.coeff = s.products + w->batch * w->height * w->width * w->columns;
    s.bias = s.coeff + rank * w->out_chs;
    s.scale = s.bias + w->out_chs;
    s.shift = s.scale + rank;
    s.scale2 = s.shift + rank;
    s.shift2 = s.scale2 + w->out_chs;
    return s;
}

/* column t * filters + j of the taps is tap t of filter j; columns behind the last are 0 */
static void pack_taps(const struct work *w, const struct parts *s, size_t first, size_t last) {
    size_t size = w->kernel * w->kernel;
    for (size_t c = first; c < last; c++) {
        float *taps = s->taps + c * w->columns;
        for (size_t t = 0; t < size; t++)
            for (size_t j = 0; j < w->filters; j++) taps[t * w->filters + j] =
                    w->unique[j * w->chs * size + c * w->unique_chs + t * w->unique_tap];
        for (size_t t = size * w->filters; t < w->columns; t++) taps[t] = 0.f;
    }
}

/* scale and shift of a norm over n channels */
static void scale_and_shift(const float *const *norm, float eps, size_t n, float *scale, float *shift) {
    for (size_t c = 0; c < n; c++) {
        scale[c] = norm[0][c] / sqrtf(norm[3][c] + eps);
        shift[c] = norm[1][c] - norm[2][c] * scale[c];
    }
}

/* A' transposed and b', for LANES outputs at a time; LANES numbers of each, for their lines to stay in the cache */
static void fold(const struct work *w, const struct parts *s, size_t first, size_t last) {
    size_t rank = w->filters + w->shared;
    for (size_t block = first * LANES; block < last * LANES; block += LANES) {
        float sums[LANES] = {0};
        for (size_t from = 0; from < rank; from += LANES)
            for (size_t c = 0; c < LANES; c++)
                for (size_t k = from; k < rank && k < from + LANES; k++) {
                    float a = w->coeff[(block + c) * rank + k] * (w->normed ? s->scale2[block + c] : 1.f);
                    s->coeff[k * w->out_chs + block + c] = a * (w->normed ? s->scale[k] : 1.f);
                    sums[c] += w->normed ? a * s->shift[k] : 0.f;
                }
        for (size_t c = block; c < block + LANES; c++)
            s->bias[c] = w->normed ? sums[c - block] + s->shift2[c] : w->norms[0][c];
    }
}

/* sum[r][v] += rows[r] . matrix[:, v], over n numbers */
INLINE void add_products(
        lanes sum[ROWS][MOST], const int vectors, const float *const *rows, const float *matrix, size_t stride,
        size_t n) {
    for (size_t k = 0; k < n; k++, matrix += stride)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) {
            lanes weight = AT_CONST(matrix + v * LANES);
#pragma GCC unroll 6
            for (int r = 0; r < ROWS; r++) sum[r][v] += weight * rows[r][k];
        }
}

/* Rows first .. first + ROWS - 1; the last one stands in for those behind it. */
INLINE void point_at(const float *data, size_t stride, size_t first, size_t last, const float **rows) {
    for (size_t r = 0; r < ROWS; r++) rows[r] = data + (first + r < last ? first + r : last - 1) * stride;
}

/* A processor does not guess by itself what comes next: it sees ROWS of rows side by side. */
INLINE void fetch_ahead(const float *data, size_t stride, size_t first, size_t size) {
    const char *row = (const char *)(data + (first + AHEAD * ROWS) * stride);
    for (size_t r = 0; r < ROWS; r++, row += stride * sizeof(float))
        for (size_t byte = 0; byte < size * sizeof(float); byte += 64) __builtin_prefetch(row + byte);
}

INLINE void store(lanes sum[ROWS][MOST], const int vectors, float *to, size_t stride, size_t rows) {
#pragma GCC unroll 6
    for (size_t r = 0; r < ROWS; r++)
        if (r < rows)
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) AT(to + r * stride + v * LANES) = sum[r][v];
}

INLINE void multiply_block(
        const struct work *w, const struct parts *s, size_t p, size_t last, size_t column, const int vectors) {
    const float *rows[ROWS];
    lanes sum[ROWS][MOST];
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) sum[r][v] = (lanes){0};
    point_at(w->x, w->chs, p, last, rows);
    if (column == 0) fetch_ahead(w->x, w->chs, p, w->chs);
    add_products(sum, vectors, rows, s->taps + column, w->columns, w->chs);
    store(sum, vectors, s->products + p * w->columns + column, w->columns, last - p);
}

INLINE void combine_block(
        const struct work *w, const struct parts *s, const float *u, size_t p, size_t last, size_t column,
        const int vectors) {
    const float *rows[ROWS];
    lanes sum[ROWS][MOST];
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) sum[r][v] = AT_CONST(s->bias + column + v * LANES);
    point_at(u, UNIQUE, 0, ROWS, rows);
    add_products(sum, vectors, rows, s->coeff + column, w->out_chs, w->filters);
    point_at(w->z, w->shared, p, last, rows);
    if (column == 0) fetch_ahead(w->z, w->shared, p, w->shared);
    fetch_ahead(w->out + column, w->out_chs, p, (size_t)vectors * LANES);
    add_products(sum, vectors, rows, s->coeff + w->filters * w->out_chs + column, w->out_chs, w->shared);
    if (w->shortcut) {
        point_at(w->shortcut + column, w->out_chs, p, last, rows);
        fetch_ahead(w->shortcut + column, w->out_chs, p, (size_t)vectors * LANES);
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) sum[r][v] += AT_CONST(rows[r] + v * LANES);
    }
    if (w->relu)
#pragma GCC unroll 6
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++)
                sum[r][v] = (lanes)((ints)sum[r][v] & ~(sum[r][v] < 0.f)); /* keeps NaN, as torch */
    store(sum, vectors, w->out + p * w->out_chs + column, w->out_chs, last - p);
}

/* U * x at one pixel: of each tap the product of the pixel that it lies on */
INLINE void add_taps(const struct work *w, const float *products, size_t p, float *u) {
    size_t row = p / w->width % w->height, column = p % w->width, half = w->kernel / 2 * w->dilation;
    for (size_t j = 0; j < w->filters; j++) u[j] = 0.f;
    for (size_t i = 0, t = 0; i < w->kernel; i++)
        for (size_t k = 0; k < w->kernel; k++, t++) {
            size_t y = row + i * w->dilation - half, x = column + k * w->dilation - half;
            if (y >= w->height || x >= w->width) continue; /* below 0 as well: they have no sign */
            const float *from = products + (p + (y - row) * w->width + (x - column)) * w->columns + t * w->filters;
            for (size_t j = 0; j < w->filters; j++) u[j] += from[j];
        }
}

/* Calls a block for each group of up to MOST vectors of columns, of which the compiler knows how many they are. */
#define FOR_COLUMNS(size, block, ...) \
    for (size_t column = 0; column < (size); column += MOST * LANES) \
        switch (((size) - column) / LANES) { \
            case 1: block(__VA_ARGS__, column, 1); break; \
            case 2: block(__VA_ARGS__, column, 2); break; \
            case 3: block(__VA_ARGS__, column, 3); break; \
            default: block(__VA_ARGS__, column, MOST); \
        }

typedef void step(const struct work *w, const struct parts *s, size_t first, size_t last);

TARGET static void multiply(const struct work *w, const struct parts *s, size_t first, size_t last) {
    for (size_t p = first; p < last; p += ROWS) FOR_COLUMNS(w->columns, multiply_block, w, s, p, last)
}

TARGET static void combine(const struct work *w, const struct parts *s, size_t first, size_t last) {
    float u[ROWS * UNIQUE];
    for (size_t p = first; p < last; p += ROWS) {
        for (size_t r = 0; r < ROWS; r++)
            add_taps(w, s->products, p + r < last ? p + r : last - 1, u + r * UNIQUE);
        FOR_COLUMNS(w->out_chs, combine_block, w, s, u, p, last)
    }
}

struct team {
    const struct work *work;
    const struct parts *parts;
    step *run;
    size_t items, shares, next;
};

/* Takes shares of the items until none is left, for each thread of a team of any size. */
static void run_shares(void *argument) {
    struct team *team = argument;
    size_t items = team->items;
    for (size_t k; (k = __atomic_fetch_add(&team->next, 1, __ATOMIC_RELAXED)) < team->shares;)
        team->run(team->work, team->parts, items * k / team->shares, items * (k + 1) / team->shares);
}

EXPORT int shared_basis_can_run(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("avx512f");
}

/* Work as above; out_chs a multiple of LANES, columns the taps of all filters rounded up to one, filters <= UNIQUE. */
EXPORT void shared_basis_run(const struct work *w, size_t threads, parallel *run_parallel) {
    struct parts s = split(w);
    size_t pixels = w->batch * w->height * w->width;
    if (w->normed) {
        scale_and_shift(w->norms, w->eps, w->filters + w->shared, s.scale, s.shift);
        scale_and_shift(w->norms + 4, w->eps2, w->out_chs, s.scale2, s.shift2);
    }
    const struct team steps[] = {
        {w, &s, pack_taps, w->chs, threads, 0},
        {w, &s, fold, w->out_chs / LANES, threads, 0},
        {w, &s, multiply, pixels, threads, 0},
        {w, &s, combine, pixels, threads, 0},
    };
    for (size_t i = 0; i < sizeof steps / sizeof *steps; i++) {
        struct team team = steps[i];
        if (threads > 1 && run_parallel) run_parallel(run_shares, &team, (unsigned)threads, 0);
        else run_shares(&team);
    }
}
#endif
