// A safetensors file, read with suspicion: https://huggingface.co/docs/safetensors
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

namespace dreamedge {

constexpr uint64_t MAX_HEADER = 1 << 24;  // bytes

class Safetensors {
  public:
    // Reads the header alone. Throws `std::invalid_argument` for a file that is none, or whose tensors do not fill it.
    explicit Safetensors(std::filesystem::path file);

    struct Place {
        std::string dtype;
        std::vector<int64_t> shape;
        uint64_t begin, end;  // bytes behind the header
    };

    const std::map<std::string, Place>& tensors() const { return tensors_; }
    const std::map<std::string, std::string>& metadata() const { return metadata_; }
    bool has(const std::string& name) const { return tensors_.count(name) > 0; }

    // Throws `std::invalid_argument` for one that is not there, or of another type or number of dimensions; length: of
    // the first dimension, any if negative.
    std::vector<int64_t> int64(const std::string& name, size_t n_dims, int64_t length = -1) const;
    std::vector<float> float32(const std::string& name, size_t n_dims, int64_t length = -1) const;
    const Place& place(const std::string& name) const;

  private:
    template <typename T>
    std::vector<T> read(const std::string& name, const char* dtype, size_t n_dims, int64_t length) const;

    std::filesystem::path file_;
    uint64_t data_ = 0;  // where the tensors begin
    std::map<std::string, Place> tensors_;
    std::map<std::string, std::string> metadata_;
};

}  // namespace dreamedge
