// Sums over examples of the squares of products, a tile at a time while it is in registers:
//
//     total[m][n] += Σ_b (Σ_t g[b][t][m] a[b][t][n])²
//
// GEMM's usual blocking: panels of g and columns of a are packed, and a tile of m × n is as large
// as the registers hold. A product is squared and added there, so that none is ever in memory.

#include <stdlib.h>
#include <string.h>

#ifdef __AVX512F__
enum { WIDTH = 16, TALL = 13, SHORT = 6 };
#else
enum { WIDTH = 8, TALL = 6, SHORT = 3 };
#endif
enum {
    COLUMNS = 2 * WIDTH,  // of a tile
    FEW = 32,             // positions up to which a tile's total stays in registers for many
                          // examples; it has SHORT rows in place of TALL
    PACKED = 2048,        // positions of as many examples as are then packed together
    RUN = 256,            // terms that are added in a row, for smaller rounding errors
    BLOCK = 1 << 19,      // elements of total to which all examples are added before the next
    LEAST = 8 * TALL,     // rows in it, for which the columns of a are packed anew
};

typedef float vec __attribute__((vector_size(4 * WIDTH)));
typedef float anywhere __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
#define AT(pointer) (*(anywhere *)(pointer))
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

// What a layer sees at the positions of an example: height × width of them, with as many columns
// as a row of the gradient has. They are runs of neighbours in memory. `next_…` are distances.
typedef struct {
    long next_example, next_down, next_across;  // position
    int height, width;
    int run, runs_in_row;
    long next_row, next_run;
} Seen;

typedef struct {
    int examples, positions;
    const float *g, *a;  // packed: (examples, positions, rows) and (examples, positions, COLUMNS)
    float *total;
    long to_next_row;
    double *traces;  // of the examples; not added to where negative
} Tile;

INLINE void multiply(const int rows, int positions, const float *g, const float *a, vec c[][2]) {
    UNROLL for (int r = 0; r < rows; r++) c[r][0] = c[r][1] = (vec){0};
    for (int t = 0; t < positions; t++, g += rows, a += COLUMNS) {
        vec a0 = AT(a), a1 = AT(a + WIDTH);
        UNROLL for (int r = 0; r < rows; r++) {
            c[r][0] += g[r] * a0;
            c[r][1] += g[r] * a1;
        }
    }
}

INLINE void add_trace(const int rows, vec c[][2], double *trace) {
    if (*trace < 0) return;
    vec squares = {0};
    UNROLL for (int r = 0; r < rows; r++) squares += c[r][0] * c[r][0] + c[r][1] * c[r][1];
    float sum = 0;
    for (int i = 0; i < WIDTH; i++) sum += squares[i];
    *trace += sum;
}

static void add_one_of_many_positions(const Tile *tile) {
    vec c[TALL][2];
    UNROLL for (int r = 0; r < TALL; r++) {
        __builtin_prefetch(tile->total + r * tile->to_next_row, 1);
        __builtin_prefetch(tile->total + r * tile->to_next_row + COLUMNS - 1, 1);
    }
    int left = tile->positions, some = left < RUN ? left : RUN;
    const float *g = tile->g, *a = tile->a;
    multiply(TALL, some, g, a, c);
    while (left -= some) {
        vec more[TALL][2];
        g += some * TALL;
        a += some * COLUMNS;
        some = left < RUN ? left : RUN;
        multiply(TALL, some, g, a, more);
        for (int r = 0; r < TALL; r++) {
            c[r][0] += more[r][0];
            c[r][1] += more[r][1];
        }
    }
    add_trace(TALL, c, tile->traces);
    UNROLL for (int r = 0; r < TALL; r++) {
        float *row = tile->total + r * tile->to_next_row;
        AT(row) += c[r][0] * c[r][0];
        AT(row + WIDTH) += c[r][1] * c[r][1];
    }
}

static void add_several_of_few_positions(const Tile *tile) {
    vec squares[SHORT][2];
    UNROLL for (int r = 0; r < SHORT; r++) {
        float *row = tile->total + r * tile->to_next_row;
        squares[r][0] = AT(row);
        squares[r][1] = AT(row + WIDTH);
    }
    const float *g = tile->g, *a = tile->a;
    for (int e = 0; e < tile->examples; e++) {
        vec c[SHORT][2];
        multiply(SHORT, tile->positions, g, a, c);
        add_trace(SHORT, c, tile->traces + e);
        UNROLL for (int r = 0; r < SHORT; r++) {
            squares[r][0] += c[r][0] * c[r][0];
            squares[r][1] += c[r][1] * c[r][1];
        }
        g += tile->positions * SHORT;
        a += tile->positions * COLUMNS;
    }
    UNROLL for (int r = 0; r < SHORT; r++) {
        float *row = tile->total + r * tile->to_next_row;
        AT(row) = squares[r][0];
        AT(row + WIDTH) = squares[r][1];
    }
}

// Copies `count` rows of g, starting with the one that g points to, and zeros up to `rows`.
INLINE void pack_rows(const int rows, float *to, const float *g, const long next[3], int examples,
                      int positions, int count) {
    for (int e = 0; e < examples; e++, g += next[0])
        for (int t = 0; t < positions; t++, to += rows) {
            const float *from = g + t * next[1];
            if (count < rows) {
                memset(to, 0, 4 * rows);
                for (int r = 0; r < count; r++) to[r] = from[r * next[2]];
            } else if (next[2] == 1)
                memcpy(to, from, 4 * rows);
            else
                for (int r = 0; r < rows; r++) to[r] = from[r * next[2]];
        }
}

// Copies columns n … n + count of what is seen, and zeros up to COLUMNS. Where that is more than
// one run, whole vectors are copied: what is read behind a run has to be memory of the tensor, and
// what is written behind it is overwritten.
static void pack_columns(float *to, const float *a, const Seen *seen, int examples, int n,
                         int count) {
    long from[COLUMNS];
    int lengths[COLUMNS], pieces = 0;
    for (int done = 0; done < count; done += lengths[pieces++]) {
        int run = (n + done) / seen->run, at = (n + done) % seen->run, left = count - done;
        from[pieces] = run / seen->runs_in_row * seen->next_row +
                       run % seen->runs_in_row * seen->next_run + at;
        lengths[pieces] = seen->run - at < left ? seen->run - at : left;
    }
    for (int e = 0; e < examples; e++, a += seen->next_example)
        for (int i = 0; i < seen->height; i++)
            for (int j = 0; j < seen->width; j++, to += COLUMNS) {
                const float *position = a + i * seen->next_down + j * seen->next_across;
                float *at = to;
                int last = pieces - 1;
                for (int p = 0; p < last; at += lengths[p++])
                    for (int x = 0; x < lengths[p]; x += WIDTH)
                        AT(at + x) = AT(position + from[p] + x);
                if (lengths[last] == COLUMNS)
                    memcpy(at, position + from[last], 4 * COLUMNS);
                else
                    memcpy(at, position + from[last], 4 * lengths[last]);
                if (count < COLUMNS) memset(to + count, 0, 4 * (COLUMNS - count));
            }
}

static void copy_tile(float *to, long to_next, const float *from, long from_next, int rows,
                      int columns) {
    for (int r = 0; r < rows; r++) memcpy(to + r * to_next, from + r * from_next, 4 * columns);
}

// Adds to some rows of total, and the columns `begin` … `end`. Returns 1 where memory ran out.
static int add_block(float *total, long to_next_row, const float *g, const long next[3],
                     const float *a, const Seen *seen, int examples, int rows, int begin, int end,
                     double *traces) {
    const int positions = seen->height * seen->width, few = positions <= FEW;
    const int height = few ? SHORT : TALL, panels = (rows + height - 1) / height;
    int together = few ? PACKED / positions : 1;
    if (together > examples) together = examples;
    const long seen_by_all = (long)together * positions, size = seen_by_all * height;
    const long needed = COLUMNS * (seen_by_all + height + 1) + size * panels;
    float *packed_a = aligned_alloc(64, (4 * needed + 63) / 64 * 64);
    if (!packed_a) return 1;
    float *edge = packed_a + COLUMNS * (seen_by_all + 1), *packed_g = edge + COLUMNS * height;
    for (int b = 0; b < examples; b += together, g += together * next[0]) {
        if (together > examples - b) together = examples - b;
        for (int p = 0; p < panels; p++) {
            int count = rows - p * height < height ? rows - p * height : height;
            const float *from = g + p * height * next[2];
            if (few) pack_rows(SHORT, packed_g + p * size, from, next, together, positions, count);
            else pack_rows(TALL, packed_g + p * size, from, next, together, positions, count);
        }
        for (int n = begin; n < end; n += COLUMNS) {
            int columns = end - n < COLUMNS ? end - n : COLUMNS;
            pack_columns(packed_a, a + b * seen->next_example, seen, together, n, columns);
            for (int p = 0; p < panels; p++) {
                int count = rows - p * height < height ? rows - p * height : height;
                float *at = total + p * height * to_next_row + n;
                int whole = count == height && columns == COLUMNS;
                Tile tile = {together, positions, packed_g + p * size, packed_a,
                             whole ? at : edge, whole ? to_next_row : COLUMNS, traces + b};
                if (!whole) copy_tile(edge, COLUMNS, at, to_next_row, count, columns);
                if (few) add_several_of_few_positions(&tile);
                else add_one_of_many_positions(&tile);
                if (!whole) copy_tile(at, to_next_row, edge, COLUMNS, count, columns);
            }
        }
    }
    free(packed_a);
    return 0;
}

static int share(int of, int part, int parts, int unit) {
    int end = (long)(of + unit - 1) / unit * part / parts * unit;
    return end < of ? end : of;
}

// Adds to total, (rows, columns). `next` are the distances of g in memory: of examples, positions
// and rows. Threads divide the longer side of total, and each has its traces. A block of rows stays
// in the cache for all examples. Returns 0, or another number where memory ran out.
int add_squares(float *total, long to_next_row, const float *g, const long next[3], const float *a,
                const Seen *seen, int examples, int rows, int columns, double *traces,
                int threads) {
    const int by_rows = rows > columns;
    int failed = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : failed)
    for (int i = 0; i < threads; i++) {
        int top = 0, bottom = rows, begin = 0, end = columns;
        if (by_rows) {
            top = share(rows, i, threads, TALL);
            bottom = share(rows, i + 1, threads, TALL);
        } else {
            begin = share(columns, i, threads, COLUMNS);
            end = share(columns, i + 1, threads, COLUMNS);
        }
        if (begin == end) continue;
        int height = BLOCK / (end - begin) / TALL * TALL;
        if (height < LEAST) height = LEAST;
        for (int m = top; m < bottom; m += height) {
            int count = bottom - m < height ? bottom - m : height;
            failed += add_block(total + m * to_next_row, to_next_row, g + m * next[2], next, a, seen,
                                examples, count, begin, end, traces + (long)i * examples);
        }
    }
    return failed;
}
