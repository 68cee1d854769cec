// Compare the kernels with float64, without ONNX Runtime: for CPUs that only an emulator has, and under sanitizers.
//
// Each array ends where its last element ends, so that a sanitizer sees every access beyond. Prints one line for each
// level and the largest errors as shares of the largest value; the exit status is the number of levels that are wrong.
#include "attention.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

namespace internvl_edge {
#define DECLARE(level) namespace level { extern const Kernels kernels; }
INTERNVL_EDGE_LEVELS(DECLARE)
}  // namespace internvl_edge

using namespace internvl_edge;

struct Case {
    int64_t heads, kv_heads, width, tokens, keys;
    bool causal;
};

static void run(const Kernels& kernels, const Attention& a) {
    if (a.tokens > 1 || !a.causal) {
        for (size_t task = kernels.block_tasks(a); task-- > 0;) kernels.block(a, task);
        return;
    }
    std::vector<float> scratch(kernels.scratch_floats(a), NAN);
    for (size_t task = kernels.split_tasks(a); task-- > 0;) kernels.split(a, task, scratch.data());
    for (size_t task = kernels.merge_tasks(a); task-- > 0;) kernels.merge(a, task, scratch.data());
}

static double error(const Kernels& kernels, const Case& c, int64_t batch) {
    std::mt19937 random(7);
    std::normal_distribution<float> normal;
    const auto draw = [&](size_t count) {
        std::vector<float> drawn(count);
        for (float& each : drawn) each = normal(random);
        return drawn;
    };
    const auto query = draw(batch * c.tokens * c.heads * c.width);
    const auto key = draw(batch * c.kv_heads * c.keys * c.width), value = draw(key.size());
    std::vector<float> output(query.size(), NAN);
    std::vector<int32_t> lengths(batch, int32_t(c.keys));
    if (batch > 1) lengths[1] = int32_t(std::max(c.tokens, c.keys / 3));
    Attention a{};
    a.query = query.data(), a.key = key.data(), a.value = value.data(), a.output = output.data();
    a.batch = batch, a.tokens = c.tokens, a.heads = c.heads, a.kv_heads = c.kv_heads, a.width = c.width;
    a.query_token = c.heads * c.width, a.query_batch = c.tokens * a.query_token;
    a.key_batch = c.kv_heads * c.keys * c.width;
    // The cache has its keys head by head, the tower token by token.
    a.key_head = c.causal ? c.keys * c.width : c.width, a.key_token = c.causal ? c.width : c.kv_heads * c.width;
    a.lengths = lengths.data(), a.keys = c.keys, a.causal = c.causal, a.scale = 1 / std::sqrt(float(c.width));
    run(kernels, a);
    double worst = 0, largest = 0;
    for (int64_t row = 0; row < batch; ++row)
        for (int64_t token = 0; token < c.tokens; ++token)
            for (int64_t head = 0; head < c.heads; ++head) {
                const int64_t seen = c.causal ? lengths[row] - c.tokens + token + 1 : c.keys;
                const float* q = a.query + a.query_of(row, token, head);
                std::vector<double> weights(seen), expected(c.width);
                double top = -INFINITY, total = 0;
                for (int64_t k = 0; k < seen; ++k) {
                    const float* found = a.key_of(row, head / a.group()) + k * a.key_token;
                    for (int64_t d = 0; d < c.width; ++d) weights[k] += double(q[d]) * found[d];
                    weights[k] *= a.scale;
                    top = std::max(top, weights[k]);
                }
                for (double& weight : weights) total += weight = std::exp(weight - top);
                for (int64_t k = 0; k < seen; ++k) {
                    const float* found = a.value_of(row, head / a.group()) + k * a.key_token;
                    for (int64_t d = 0; d < c.width; ++d) expected[d] += weights[k] / total * found[d];
                }
                for (int64_t d = 0; d < c.width; ++d) {
                    const double difference = std::fabs(output[a.query_of(row, token, head) + d] - expected[d]);
                    worst = std::isfinite(difference) ? std::max(worst, difference) : INFINITY;
                    largest = std::max(largest, std::fabs(expected[d]));
                }
            }
    return worst / largest;
}

int main() {
    const Case one[] = {{14, 2, 64, 1, 300, true}, {16, 2, 128, 1, 129, true}, {3, 3, 96, 1, 17, true},
                        {6, 1, 80, 1, 1, true},    {34, 2, 16, 1, 400, true}};
    const Case many[] = {{14, 2, 64, 33, 300, true}, {4, 2, 128, 70, 70, true},   {3, 3, 96, 2, 257, true},
                         {6, 1, 80, 40, 60, true},   {5, 5, 64, 65, 65, false},   {2, 2, 96, 1, 300, false},
                         {2, 2, 16, 100, 31, false}, {2, 1, 32, 200, 520, true}};
    int wrong = 0;
    const auto check = [&](const Kernels& kernels) {
        double one_token = 0, block = 0;
        for (const Case& each : one)
            for (int64_t batch : {1, 3}) one_token = std::max(one_token, error(kernels, each, batch));
        for (const Case& each : many)
            for (int64_t batch : {1, 2}) block = std::max(block, error(kernels, each, batch));
        const bool rounds = std::strstr(kernels.name, "bf16") != nullptr;
        const bool good = one_token < 2e-6 && (rounds ? block > 1e-4 && block < 1e-2 : block < 2e-6);
        std::printf("%s: one token %.1e, blocks %.1e%s\n", kernels.name, one_token, block, good ? "" : ", WRONG");
        wrong += !good;
    };
#define CHECK(level) check(level::kernels);
    INTERNVL_EDGE_LEVELS(CHECK)
    return wrong;
}
