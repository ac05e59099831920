// A GPT-2 client in C++ with ONNX Runtime's C++ API. It takes token ids, and prints token ids while they are generated.
//
//   g++ -std=c++17 -O2 client.cpp -I include/onnxruntime -l:libonnxruntime.so.1 -o client
//   ./client gpt2-onnx/ --new 20 --temperature 0.8 --top-k 40 --seed 1 --threads 2 -- 33322 40 25
//
// All precisions and kinds of cache work. The first argument is a directory or a model, such as
// gpt2-onnx/onnx/model_q4.onnx.
#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <iostream>
#include <map>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

using Ids = std::vector<int64_t>;

// Return the first model that exists in the directory. A path that is not a directory is returned unchanged.
std::filesystem::path find_model(const std::filesystem::path& path) {
    if (!std::filesystem::is_directory(path)) return path;
    for (auto name : {"model.onnx", "model_quantized.onnx", "model_int8.onnx", "model_q4.onnx", "model_fp16.onnx"})
        if (auto file = path / "onnx" / name; std::filesystem::exists(file)) return file;
    throw std::runtime_error(path.string() + ": no model in onnx/; create the directory with gpt2x export --onnx");
}

// Sample a token id. Temperature 0 is greedy decoding; top_k 0 keeps all tokens.
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
    std::map<std::string, double> options{{"--new", 40}, {"--temperature", 1}, {"--top-k", 0}, {"--seed", 1}, {"--threads", 0}};
    int next = 2;
    for (; next + 1 < argc && options.count(argv[next]); next += 2) options[argv[next]] = std::atof(argv[next + 1]);
    const bool valid = std::all_of(options.begin(), options.end(), [](auto& option) { return option.second >= 0; });
    if (!valid || next + 1 >= argc || argv[next] != std::string("--")) {
        std::cerr << "usage: client DIR|MODEL.onnx [--new N] [--temperature T] [--top-k K] [--seed S] [--threads N] -- ID...\n"
                     "all numbers must be at least 0\n";
        return 2;
    }
    Ids ids;
    for (int i = next + 1; i < argc; i++) ids.push_back(std::atoll(argv[i]));
    const int64_t top_k = options["--top-k"];
    std::mt19937_64 random(options["--seed"]);

    const auto model = find_model(argv[1]);
    Ort::SessionOptions settings;
    settings.SetIntraOpNumThreads(options["--threads"]);  // 0: one per core
    Ort::Env env(ORT_LOGGING_LEVEL_FATAL, "gpt2");
    Ort::Session session(env, model.c_str(), settings);
    Ort::AllocatorWithDefaultOptions allocator;
    std::vector<std::string> inputs, outputs;
    for (size_t i = 0; i < session.GetInputCount(); i++) inputs.push_back(session.GetInputNameAllocated(i, allocator).get());
    for (size_t i = 0; i + 2 < inputs.size(); i++)  // the logits, and one output for each input of the cache
        outputs.push_back(session.GetOutputNameAllocated(i, allocator).get());
    std::vector<const char*> in, out;
    for (auto& name : inputs) in.push_back(name.c_str());
    for (auto& name : outputs) out.push_back(name.c_str());

    auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    auto tensor = [&](Ids& values) {
        const int64_t size[] = {1, static_cast<int64_t>(values.size())};
        return Ort::Value::CreateTensor<int64_t>(memory, values.data(), values.size(), size, 2);
    };
    std::vector<Ort::Value> cache;  // float, float16 or int8, as the model declares; empty at first
    for (size_t i = 3; i < in.size(); i++) {
        auto type = session.GetInputTypeInfo(i);
        auto info = type.GetTensorTypeAndShapeInfo();
        auto shape = info.GetShape();  // batch, heads, cached tokens, head size
        shape[0] = 1, shape[2] = 0;
        cache.push_back(Ort::Value::CreateTensor(allocator, shape.data(), shape.size(), info.GetElementType()));
    }

    Ids mask;
    for (int64_t step = 0; step < options["--new"]; step++) {  // prefill, then one token per run with the cache
        Ids positions(ids.size());
        std::iota(positions.begin(), positions.end(), mask.size());
        mask.resize(mask.size() + ids.size(), 1);
        std::vector<Ort::Value> feed;
        for (Ids* values : {&ids, &mask, &positions}) feed.push_back(tensor(*values));
        for (auto& value : cache) feed.push_back(std::move(value));
        auto result = session.Run(Ort::RunOptions{nullptr}, in.data(), feed.data(), in.size(), out.data(), out.size());
        const auto size = result[0].GetTensorTypeAndShapeInfo().GetShape();  // batch, positions, vocabulary
        const float* last = result[0].GetTensorData<float>() + (size[1] - 1) * size[2];
        ids = {sample(last, size[2], options["--temperature"], top_k, random)};
        std::cout << ids[0] << ' ' << std::flush;
        cache.clear();
        for (size_t i = 1; i < result.size(); i++) cache.push_back(std::move(result[i]));
    }
    std::cout << '\n';
} catch (const std::exception& error) {
    return std::cerr << "client: " << error.what() << '\n', 1;
}
