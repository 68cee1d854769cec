// What the operators and the kernels share. The kernels are compiled once for each level of CPU features.
#pragma once

#include <cstddef>
#include <cstdint>

namespace internvl_edge {

// One attention: softmax(scale * q k^T) v for each query head. All strides count floats; the last axis is contiguous.
struct Attention {
    const float* query;   // [batch, tokens, heads, width]
    const float* key;     // [batch, kv_heads, keys, width], in any order of axes
    const float* value;   // as key
    float* output;        // as query
    size_t query_batch, query_token;                // of query and output; heads are neighbors
    size_t key_batch, key_head, key_token;          // of key and value
    int64_t batch, tokens, heads, kv_heads, width;  // heads is a multiple of kv_heads, width of 16
    const int32_t* lengths;  // [batch]: the keys that the last query sees, where `causal`
    int64_t keys;            // the keys that each query sees, where not
    bool causal;
    float scale;

    int64_t group() const { return heads / kv_heads; }
    int64_t length(int64_t row) const { return causal ? lengths[row] : keys; }
    const float* key_of(int64_t row, int64_t kv_head) const { return key + row * key_batch + kv_head * key_head; }
    const float* value_of(int64_t row, int64_t kv_head) const { return value + row * key_batch + kv_head * key_head; }
    size_t query_of(int64_t row, int64_t token, int64_t head) const {
        return row * query_batch + token * query_token + head * width;
    }
};

// One level. Tasks are independent of each other. How the work is cut depends on positions alone, never on the number
// of threads or rows, so a row gets the same numbers to the bit whoever else is computed.
struct Kernels {
    const char* name;
    // One query per row. `split` tasks leave partial results in `scratch`, `merge` tasks join them.
    size_t (*split_tasks)(const Attention&);
    size_t (*scratch_floats)(const Attention&);
    void (*split)(const Attention&, size_t task, float* scratch);
    size_t (*merge_tasks)(const Attention&);
    void (*merge)(const Attention&, size_t task, const float* scratch);
    // Many queries per row.
    size_t (*block_tasks)(const Attention&);
    void (*block)(const Attention&, size_t task);
};

}  // namespace internvl_edge
