// A GPT-2 client in C++ with ONNX Runtime's C++ API: token ids in, token ids out as they are made.
//
//   g++ -std=c++17 -O2 client.cpp -I include/onnxruntime -l:libonnxruntime.so.1 -o client
//   ./client gpt2-onnx/onnx/model.onnx 20 0.8 40 1 -- 33322 40 25    # new tokens, temperature, top-k, seed, prompt
#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <iostream>
#include <numeric>
#include <random>
#include <string>
#include <vector>

using Ids = std::vector<int64_t>;

// One token of the likeliest top_k (0: of all); temperature 0 is greedy.
int64_t sample(const float* logits, int64_t size, double temperature, int64_t top_k, std::mt19937_64& random) {
    if (temperature == 0) return std::max_element(logits, logits + size) - logits;
    Ids order(size);
    std::iota(order.begin(), order.end(), 0);
    const int64_t k = top_k ? std::min(top_k, size) : size;
    std::partial_sort(order.begin(), order.begin() + k, order.end(), [&](auto a, auto b) { return logits[a] > logits[b]; });
    std::vector<double> weights(k);
    for (int64_t i = 0; i < k; i++) weights[i] = std::exp((logits[order[i]] - logits[order[0]]) / temperature);
    return order[std::discrete_distribution<int64_t>(weights.begin(), weights.end())(random)];
}

int main(int argc, char** argv) try {
    if (argc < 8) return std::cerr << "usage: client MODEL.onnx NEW TEMPERATURE TOP_K SEED -- ID...\n", 2;
    const int64_t count = std::atoll(argv[2]), top_k = std::atoll(argv[4]);
    const double temperature = std::atof(argv[3]);
    std::mt19937_64 random(std::atoll(argv[5]));
    Ids ids;
    for (int i = 7; i < argc; i++) ids.push_back(std::atoll(argv[i]));

    Ort::Env env(ORT_LOGGING_LEVEL_ERROR, "gpt2");
    Ort::Session session(env, argv[1], Ort::SessionOptions{});
    Ort::AllocatorWithDefaultOptions allocator;
    std::vector<std::string> inputs, outputs;
    for (size_t i = 0; i < session.GetInputCount(); i++) inputs.push_back(session.GetInputNameAllocated(i, allocator).get());
    for (size_t i = 0; i < session.GetOutputCount(); i++) outputs.push_back(session.GetOutputNameAllocated(i, allocator).get());
    std::vector<const char*> in, out;
    for (auto& name : inputs) in.push_back(name.c_str());
    for (auto& name : outputs) out.push_back(name.c_str());
    auto shape = session.GetInputTypeInfo(3).GetTensorTypeAndShapeInfo().GetShape();  // of past_key_values.0.key
    shape[0] = 1, shape[2] = 0;                                                       // an empty cache

    auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    auto tensor = [&](Ids& values) {
        const int64_t size[] = {1, static_cast<int64_t>(values.size())};
        return Ort::Value::CreateTensor<int64_t>(memory, values.data(), values.size(), size, 2);
    };
    std::vector<Ort::Value> cache;
    for (size_t i = 3; i < in.size(); i++)
        cache.push_back(Ort::Value::CreateTensor<float>(allocator, shape.data(), shape.size()));

    Ids mask;
    for (int64_t made = 0; made < count; made++) {  // prefill, then one token a run on the cache
        Ids positions(ids.size());
        std::iota(positions.begin(), positions.end(), mask.size());
        mask.resize(mask.size() + ids.size(), 1);
        std::vector<Ort::Value> feed;
        for (Ids* values : {&ids, &mask, &positions}) feed.push_back(tensor(*values));
        for (auto& value : cache) feed.push_back(std::move(value));
        auto result = session.Run(Ort::RunOptions{nullptr}, in.data(), feed.data(), in.size(), out.data(), out.size());
        const auto size = result[0].GetTensorTypeAndShapeInfo().GetShape();  // batch, positions, vocabulary
        const float* last = result[0].GetTensorData<float>() + (size[1] - 1) * size[2];
        ids = {sample(last, size[2], temperature, top_k, random)};
        std::cout << ids[0] << ' ' << std::flush;
        cache.clear();
        for (size_t i = 1; i < result.size(); i++) cache.push_back(std::move(result[i]));
    }
    std::cout << '\n';
} catch (const Ort::Exception& error) {
    return std::cerr << error.what() << '\n', 1;
}
