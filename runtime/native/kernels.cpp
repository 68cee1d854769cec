// The attention kernels, compiled once for each level of CPU features (INTERNVL_EDGE_LEVEL).
//
// One query per row: flash-decoding. The keys of a KV head are read once for all its query heads; pieces of the
// sequence are computed by themselves and then merged (Dao et al., 2023, "Flash-Decoding for long-context inference").
// Many queries: blocks with an online softmax (Dao, 2023, "FlashAttention-2"), products in bfloat16 where the level has
// instructions for them, sums in float32 always.
#include "attention.h"
#include "vectors.h"

#include <cmath>
#include <memory>
#include <new>

namespace internvl_edge::INTERNVL_EDGE_LEVEL {

// ---- one query per row ----------------------------------------------------------------------------------------------

constexpr int64_t SPLIT = 128;  // keys of a piece: 32 KB of keys 64 wide
// Accumulators of the weighted sum: query heads times vectors.
constexpr int SUM_HEADS = W == 16 ? 7 : REGISTERS == 32 ? 6 : 3;
constexpr int SUM_VECTORS = 4;

// Scores are multiplied by this, so that weights are powers of 2.
float score_factor(const Attention& a) { return a.scale * 1.44269504f; }

// A partial result: the weighted sum [width], the largest score, and the sum of weights.
size_t partial_floats(const Attention& a) { return a.width + W; }

int64_t pieces(int64_t length) { return (length + SPLIT - 1) / SPLIT; }

int64_t most_pieces(const Attention& a) {
    int64_t most = 0;
    for (int64_t row = 0; row < a.batch; ++row) most = pieces(a.length(row)) > most ? pieces(a.length(row)) : most;
    return most;
}

size_t split_tasks(const Attention& a) { return a.batch * a.kv_heads * most_pieces(a); }

size_t scratch_floats(const Attention& a) { return split_tasks(a) * a.group() * partial_floats(a); }

// The products of one query with W keys. Keys after the last one are read as the last one.
Floats dots(const Attention& a, const float* query, const float* keys, int64_t count) {
    const float* row[W];
    for (int j = 0; j < W; ++j) row[j] = keys + (j < count ? j : count - 1) * a.key_token;
    Floats total[W] = {};
    for (int64_t d = 0; d < a.width; d += W) {
        const Floats q = load<Floats>(query + d);
        for (int j = 0; j < W; ++j) total[j] += load<Floats>(row[j] + d) * q;
    }
    return sums(total);
}

// sums[head][0 .. VECTORS * W] = the values weighted by weights[head][key], for HEADS heads.
template <int HEADS, int VECTORS>
void weigh(const Attention& a, const float* values, const float* weights, int64_t count, float* sums, size_t stride) {
    Floats total[HEADS][VECTORS] = {};
    for (int64_t key = 0; key < count; ++key) {
        Floats value[VECTORS];
        for (int v = 0; v < VECTORS; ++v) value[v] = load<Floats>(values + key * a.key_token + v * W);
        for (int h = 0; h < HEADS; ++h)
            for (int v = 0; v < VECTORS; ++v) total[h][v] += value[v] * weights[h * SPLIT + key];
    }
    for (int h = 0; h < HEADS; ++h)
        for (int v = 0; v < VECTORS; ++v) store(sums + h * stride + v * W, total[h][v]);
}

template <int HEADS>
void weigh_heads(const Attention& a, const float* values, const float* weights, int64_t count, float* sums) {
    const size_t stride = partial_floats(a);
    int64_t d = 0;
    for (; d + SUM_VECTORS * W <= a.width; d += SUM_VECTORS * W)
        weigh<HEADS, SUM_VECTORS>(a, values + d, weights, count, sums + d, stride);
    for (; d < a.width; d += W) weigh<HEADS, 1>(a, values + d, weights, count, sums + d, stride);
}

template <int HEADS = SUM_HEADS>
void weigh_some(int heads, const Attention& a, const float* values, const float* weights, int64_t count, float* sums) {
    if constexpr (HEADS > 0) {
        if (heads == HEADS) return weigh_heads<HEADS>(a, values, weights, count, sums);
        weigh_some<HEADS - 1>(heads, a, values, weights, count, sums);
    }
}

void split(const Attention& a, size_t task, float* scratch) {
    const int64_t most = most_pieces(a), piece = task % most;
    const int64_t kv_head = task / most % a.kv_heads, row = task / most / a.kv_heads;
    const int64_t start = piece * SPLIT;
    const int64_t count = a.length(row) - start < SPLIT ? a.length(row) - start : SPLIT;
    if (count <= 0) return;
    const float* keys = a.key_of(row, kv_head) + start * a.key_token;
    const float* values = a.value_of(row, kv_head) + start * a.key_token;
    const float* query = a.query + a.query_of(row, 0, kv_head * a.group());
    const size_t stride = partial_floats(a);
    float* partial = scratch + task * a.group() * stride;
    alignas(64) float weights[SUM_HEADS * SPLIT];
    for (int64_t first = 0; first < a.group(); first += SUM_HEADS) {
        const int heads = int(a.group() - first < SUM_HEADS ? a.group() - first : SUM_HEADS);
        for (int64_t key = 0; key < count; key += W)  // each key is read for all heads while it is in the cache
            for (int h = 0; h < heads; ++h)
                store(weights + h * SPLIT + key,
                      dots(a, query + (first + h) * a.width, keys + key * a.key_token, count - key) * score_factor(a));
        for (int h = 0; h < heads; ++h) {
            float* own = weights + h * SPLIT;
            for (int64_t key = count; key % W != 0; ++key) own[key] = -INFINITY;
            Floats most_of = load<Floats>(own), total = {};
            for (int64_t key = W; key < count; key += W) most_of = larger(most_of, load<Floats>(own + key));
            const float top = largest(most_of);
            for (int64_t key = 0; key < count; key += W) {
                const Floats weight = power_of_2(load<Floats>(own + key) - top);
                store(own + key, weight);
                if (key + W <= count) total += weight;
            }
            float rest = 0;
            for (int64_t key = count / W * W; key < count; ++key) rest += own[key];
            partial[(first + h) * stride + a.width] = top;
            partial[(first + h) * stride + a.width + 1] = sum(total) + rest;
        }
        weigh_some(heads, a, values, weights, count, partial + first * stride);
    }
}

size_t merge_tasks(const Attention& a) { return a.batch * a.heads; }

void merge(const Attention& a, size_t task, const float* scratch) {
    const int64_t row = task / a.heads, head = task % a.heads, kv_head = head / a.group();
    const int64_t most = most_pieces(a), count = pieces(a.length(row));
    const size_t stride = partial_floats(a);
    const float* first = scratch + ((row * a.kv_heads + kv_head) * most * a.group() + head % a.group()) * stride;
    const size_t step = a.group() * stride;
    float top = -INFINITY, total = 0;
    for (int64_t piece = 0; piece < count; ++piece) top = std::fmax(top, first[piece * step + a.width]);
    float* output = a.output + a.query_of(row, 0, head);
    for (int64_t piece = 0; piece < count; ++piece) {
        const float* partial = first + piece * step;
        const float weight = std::exp2(partial[a.width] - top);
        total += weight * partial[a.width + 1];
        for (int64_t d = 0; d < a.width; d += W) {
            const Floats before = piece ? load<Floats>(output + d) : Floats{};
            store(output + d, before + load<Floats>(partial + d) * weight);
        }
    }
    for (int64_t d = 0; d < a.width; d += W) store(output + d, load<Floats>(output + d) / total);
}

// ---- many queries per row -------------------------------------------------------------------------------------------

// Rows of a block are pairs (token, query head of one KV head), the heads of a token side by side, so that they share
// packed keys and values. A tile of the product has TILE_ROWS rows and TILE_VECTORS vectors of columns.
constexpr int TILE_ROWS = W == 16 ? 12 : 6;
constexpr int TILE_VECTORS = W == 4 && REGISTERS == 32 ? 4 : 2;
constexpr int TILE = TILE_VECTORS * W;
constexpr int64_t ROWS = 192;   // of a block; a multiple of TILE_ROWS
constexpr int64_t KEYS = 256;  // of a block; a multiple of TILE

int64_t padded(int64_t width) { return (width + TILE - 1) / TILE * TILE; }

int64_t row_blocks(const Attention& a) { return (a.tokens * a.group() + ROWS - 1) / ROWS; }

size_t block_tasks(const Attention& a) { return a.batch * a.kv_heads * row_blocks(a); }

// c[TILE_ROWS][TILE] = factor[row] * c + a b, with a [TILE_ROWS][depth] units of a row-major matrix, b [depth][TILE]
// units. Without factors, c = a b.
template <class Number>
void multiply(const typename Number::Unit* a, size_t a_stride, const typename Number::Unit* b, int64_t depth, float* c,
              size_t c_stride, const float* factors) {
    Floats total[TILE_ROWS][TILE_VECTORS];
    for (int r = 0; r < TILE_ROWS; ++r)
        for (int v = 0; v < TILE_VECTORS; ++v)
            total[r][v] = factors ? load<Floats>(c + r * c_stride + v * W) * factors[r] : Floats{};
    for (int64_t d = 0; d < depth; ++d) {
        typename Number::Vector right[TILE_VECTORS];
        for (int v = 0; v < TILE_VECTORS; ++v) right[v] = load<typename Number::Vector>(b + d * TILE + v * W);
        for (int r = 0; r < TILE_ROWS; ++r) {
            const auto left = Number::broadcast(a[r * a_stride + d]);
            for (int v = 0; v < TILE_VECTORS; ++v) total[r][v] = Number::add_product(total[r][v], left, right[v]);
        }
    }
    for (int r = 0; r < TILE_ROWS; ++r)
        for (int v = 0; v < TILE_VECTORS; ++v) store(c + r * c_stride + v * W, total[r][v]);
}

// The memory of one thread for one block, aligned to cache lines and kept for the next block.
struct Workspace {
    float* take(size_t floats) {
        if (floats > size_) {
            memory_.reset();
            memory_.reset(static_cast<float*>(::operator new(4 * floats, std::align_val_t{64})));
            size_ = floats;
        }
        return memory_.get();
    }

private:
    struct Free {
        void operator()(float* memory) const { ::operator delete(memory, std::align_val_t{64}); }
    };
    std::unique_ptr<float, Free> memory_;
    size_t size_ = 0;
};

template <class Number>
struct Block {
    using Unit = typename Number::Unit;
    using Vector = typename Number::Vector;
    static constexpr int DEPTH = Number::DEPTH;

    const Attention& a;
    const int64_t width, row, kv_head, first, rows;
    Unit *queries, *keys, *values, *weights;
    float *scores, *sums, *tops, *totals, *factors;

    Block(const Attention& attention, size_t task)
        : a(attention), width(padded(a.width)), row(task / row_blocks(a) / a.kv_heads),
          kv_head(task / row_blocks(a) % a.kv_heads), first(task % row_blocks(a) * ROWS),
          rows(a.tokens * a.group() - first < ROWS ? a.tokens * a.group() - first : ROWS) {
        static thread_local Workspace workspace;
        const size_t sizes[] = {size_t(ROWS * a.width / DEPTH), size_t(KEYS * a.width / DEPTH),
                                size_t(KEYS * width / DEPTH),   size_t(TILE_ROWS * KEYS / DEPTH),
                                size_t(TILE_ROWS * KEYS),       size_t(ROWS * width),
                                size_t(ROWS),                   size_t(ROWS),
                                size_t(ROWS)};
        size_t all = 0;
        for (size_t size : sizes) all += size;
        float* next = workspace.take(all);
        const size_t* size = sizes;
        const auto part = [&] { return std::exchange(next, next + *size++); };
        queries = reinterpret_cast<Unit*>(part());
        keys = reinterpret_cast<Unit*>(part());
        values = reinterpret_cast<Unit*>(part());
        weights = reinterpret_cast<Unit*>(part());
        scores = part();
        sums = part();
        tops = part();
        totals = part();
        factors = part();
    }

    size_t query_of(int64_t r) const {
        return a.query_of(row, (first + r) / a.group(), kv_head * a.group() + (first + r) % a.group());
    }

    // The keys that a row sees, from the first one on.
    int64_t seen(int64_t r) const {
        return a.causal ? a.length(row) - a.tokens + (first + r) / a.group() + 1 : a.keys;
    }

    void run() {
        const int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
        for (int64_t r = 0; r < tiles * TILE_ROWS; ++r) {
            for (int64_t d = 0; d < a.width; d += W * DEPTH) {
                const Vector x = r < rows ? along(a.query + query_of(r) + d) : Vector{};
                store(queries + (r * a.width + d) / DEPTH, x);
            }
            tops[r] = -INFINITY;
            totals[r] = 0;
        }
        std::memset(sums, 0, tiles * TILE_ROWS * width * sizeof(float));
        const int64_t last = seen(rows - 1);
        for (int64_t start = 0; start < last; start += KEYS) {
            const int64_t count = last - start < KEYS ? last - start : KEYS;
            pack_keys(start, count);
            pack_values(start, count);
            const int64_t columns = (count + TILE - 1) / TILE * TILE;
            const int64_t depth = (count + DEPTH - 1) / DEPTH;
            for (int64_t top = 0; top < tiles * TILE_ROWS; top += TILE_ROWS) {
                for (int64_t left = 0; left < columns; left += TILE)
                    multiply<Number>(queries + top * a.width / DEPTH, a.width / DEPTH, keys + left * a.width / DEPTH,
                                     a.width / DEPTH, scores + left, KEYS, nullptr);
                for (int r = 0; r < TILE_ROWS; ++r)
                    softmax(top + r, scores + r * KEYS, weights + r * KEYS / DEPTH, start, columns);
                for (int64_t d = 0; d < width; d += TILE)
                    multiply<Number>(weights, KEYS / DEPTH, values + d * KEYS / DEPTH, depth, sums + top * width + d,
                                     width, factors + top);
            }
        }
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t d = 0; d < a.width; d += W)
                store(a.output + query_of(r) + d, load<Floats>(sums + r * width + d) / totals[r]);
    }

    static Vector along(const float* from) {
        Floats x[DEPTH];
        for (int j = 0; j < DEPTH; ++j) x[j] = load<Floats>(from + j * W);
        return Number::along(x);
    }

    // Panels [width / DEPTH][TILE] of transposed keys. Keys after the last one are copies of it; nobody sees them.
    void pack_keys(int64_t start, int64_t count) {
        const float* from = a.key_of(row, kv_head) + start * a.key_token;
        for (int64_t key = 0; key < (count + TILE - 1) / TILE * TILE; key += W) {
            Unit* panel = keys + key / TILE * TILE * a.width / DEPTH + key % TILE;
            for (int64_t d = 0; d < a.width; d += W * DEPTH) {
                Vector square[W];
                for (int j = 0; j < W; ++j)
                    square[j] = along(from + (key + j < count ? key + j : count - 1) * a.key_token + d);
                transpose(square);
                for (int j = 0; j < W; ++j) store(panel + (d / DEPTH + j) * TILE, square[j]);
            }
        }
    }

    // Panels [KEYS / DEPTH][TILE] of values. The columns that pad the width are zeros.
    void pack_values(int64_t start, int64_t count) {
        const float* from = a.value_of(row, kv_head) + start * a.key_token;
        for (int64_t d = 0; d < width; d += W) {
            Unit* panel = values + d / TILE * TILE * KEYS / DEPTH + d % TILE;
            for (int64_t key = 0; key < count; key += DEPTH) {
                Floats rows[DEPTH] = {};
                for (int j = 0; j < DEPTH && d < a.width; ++j)
                    rows[j] = load<Floats>(from + (key + j < count ? key + j : count - 1) * a.key_token + d);
                store(panel + key / DEPTH * TILE, Number::across(rows));
            }
        }
    }

    // The weights of one row for a block of keys, and the factor by which its earlier sums shrink.
    void softmax(int64_t r, float* row_scores, Unit* row_weights, int64_t start, int64_t columns) {
        const int64_t visible = r < rows ? seen(r) - start : 0;
        const int64_t count = visible < columns ? (visible > 0 ? visible : 0) : columns;
        for (int64_t key = count; key % W != 0; ++key) row_scores[key] = -INFINITY;
        Floats most = splat(tops[r]);
        for (int64_t key = 0; key < count; key += W) most = larger(most, load<Floats>(row_scores + key));
        const float top = largest(most), factor = score_factor(a);
        factors[r] = top > tops[r] ? std::exp2((tops[r] - top) * factor) : 1;
        tops[r] = top;
        Floats total = {};
        for (int64_t key = 0; key < columns; key += W * DEPTH) {
            Floats weight[DEPTH] = {};
            for (int j = 0; j < DEPTH; ++j) {
                const int64_t at = key + j * W;
                if (at >= count) continue;
                weight[j] = power_of_2(load<Floats>(row_scores + at) * factor - top * factor);
                for (int lane = int(count - at); lane < W; ++lane) weight[j][lane] = 0;
                total += weight[j];
            }
            store(row_weights + key / DEPTH, Number::along(weight));
        }
        totals[r] = totals[r] * factors[r] + sum(total);
    }
};

void block(const Attention& a, size_t task) {
#if defined(INTERNVL_EDGE_BFLOAT16)
    if (a.width % (W * Bfloat16::DEPTH) == 0) return Block<Bfloat16>(a, task).run();
#endif
    Block<Float32>(a, task).run();
}

#define INTERNVL_EDGE_TEXT(name) INTERNVL_EDGE_QUOTE(name)
#define INTERNVL_EDGE_QUOTE(name) #name

extern const Kernels kernels;
const Kernels kernels = {INTERNVL_EDGE_TEXT(INTERNVL_EDGE_LEVEL), split_tasks, scratch_floats, split, merge_tasks, merge,
                         block_tasks, block};

}  // namespace internvl_edge::INTERNVL_EDGE_LEVEL
