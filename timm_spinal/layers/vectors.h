/* Vectors of floats, and calling the team of threads that torch has. For GCC and Clang. */
#include <stddef.h>
#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))
#define EXPORT __attribute__((visibility("default")))
#define LANES 16

/* 16 numbers, which the compiler keeps in as many registers as a path needs; memory need not be aligned */
typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
#define AT(x) (*(lanes *)(x))
#define AT_CONST(x) (*(const lanes *)(x))

/* GOMP_parallel of the OpenMP that torch has loaded, or NULL for one thread. Threads of our own would compete with
 * torch's, which wait for work without sleeping. */
typedef void parallel(void (*function)(void *), void *argument, unsigned threads, unsigned flags);
