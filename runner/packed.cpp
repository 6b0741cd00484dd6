#include "packed.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <unistd.h>

#include <fstream>
#include <stdexcept>

#include "delegates.h"
#include "errors.h"
#include "processor.h"

namespace dreamedge {
namespace {

constexpr std::string_view MAGIC = "CWPX";  // before the last four bytes of a complete file

class Mapping {
  public:
    explicit Mapping(const std::filesystem::path& file) : n_bytes_(std::filesystem::file_size(file)) {
        const int opened = open(file.c_str(), O_RDONLY | O_CLOEXEC);
        data_ = opened < 0 ? MAP_FAILED : mmap(nullptr, n_bytes_, PROT_READ, MAP_PRIVATE, opened, 0);
        if (opened >= 0) close(opened);
        if (data_ == MAP_FAILED) artifact_error(file.string() + ": cannot be read");
    }
    Mapping(const Mapping&) = delete;
    ~Mapping() { munmap(data_, n_bytes_); }

    std::string_view view() const { return {static_cast<const char*>(data_), n_bytes_}; }

  private:
    size_t n_bytes_;
    void* data_;
};

// By the program, the runtime and the processor: other kernels want the weights in another order.
std::string name_of(const std::filesystem::path& program, std::string_view content) {
    std::string more = "dreamedge-run " EXECUTORCH_VERSION;
    for (const std::string& feature : features()) more += " " + feature;
    if (const std::string why = why_not_kept(content); !why.empty()) {
        usage_error(program.string() + ": packed weights cannot be kept: " + why);
    }
    return identity(content, more) + ".packed";
}

bool is_whole(const std::filesystem::path& file) {
    std::ifstream opened(file, std::ios::binary);
    std::string end(MAGIC.size(), '\0');
    opened.seekg(-8, std::ios::end);
    opened.read(end.data(), static_cast<std::streamsize>(end.size()));
    return end == MAGIC;
}

// A full disk would end the process: the runtime writes through a map.
void check_room(const std::filesystem::path& program, const std::filesystem::path& folder) {
    const uint64_t needed = 2 * std::filesystem::file_size(program);
    const uint64_t free = std::filesystem::space(folder).available;
    if (access(folder.c_str(), W_OK) != 0) throw Error(Exit::output, folder.string() + ": is not writable");
    if (free < needed) {
        throw Error(Exit::output, folder.string() + ": packed weights may take " + std::to_string(needed >> 20) +
                                      " MiB, " + std::to_string(free >> 20) + " are free");
    }
}

// What killed processes left: the runtime holds a lock on what it is writing.
void remove_left_behind(const std::filesystem::path& folder) {
    for (const auto& entry : std::filesystem::directory_iterator(folder)) {
        const std::string name = entry.path().filename();
        const bool is_ours =
            name.front() == '.' && name.find(".packed.") == 33 && entry.path().extension() == ".partial";
        if (!is_ours || !entry.is_regular_file()) continue;
        const int opened = open(entry.path().c_str(), O_RDONLY | O_CLOEXEC);
        if (opened < 0) continue;
        std::error_code ignored;
        if (flock(opened, LOCK_EX | LOCK_NB) == 0) std::filesystem::remove(entry.path(), ignored);
        close(opened);
    }
}

[[noreturn]] void cannot_be_kept(const std::filesystem::path& folder, const std::string& because) {
    throw Error(Exit::output, folder.string() + ": packed weights cannot be kept there: " + because);
}

}  // namespace

Packed::Packed(const std::filesystem::path& program, const std::filesystem::path& folder) {
    if (folder.empty()) usage_error("packed_cache: give a folder");
    const Mapping mapping(program);
    try {
        const std::string name = name_of(program, mapping.view());
        std::filesystem::create_directories(folder);
        remove_left_behind(folder);
        file_ = written_ = folder / name;
        if (std::filesystem::exists(file_)) {
            if (!std::filesystem::is_regular_file(file_)) cannot_be_kept(folder, name + " is no file");
            if (access(file_.c_str(), R_OK) != 0) cannot_be_kept(folder, name + " cannot be read");
            if (!is_whole(file_)) std::filesystem::remove(file_);
        }
        if (!std::filesystem::exists(file_)) {
            written_ = folder / ("." + name + "." + std::to_string(getpid()) + ".partial");
            check_room(program, folder);
            // What is kept is used later without a look at the constants themselves.
            if (const std::string changed = changed_constant(mapping.view()); !changed.empty()) {
                artifact_error(program.string() + ": damaged: its constant " + one_line(changed, 80) +
                               " is not what it was made with");
            }
        }
    } catch (const std::filesystem::filesystem_error& error) {
        cannot_be_kept(folder, error.code().message());
    } catch (const std::invalid_argument& error) {
        artifact_error(program.string() + ": damaged: " + error.what());
    }
    if (written_.native().size() >= executorch::runtime::kMaxOptionValueLength) {
        usage_error("packed_cache: its path is longer than the runtime takes: " + written_.string());
    }
    options_.set_option("packed_cache_path", written_.c_str());
    options_.set_option("weight_cache_enabled", true);
    by_backend_.set_options(BACKEND, options_.view());
}

void Packed::keep() {
    if (written_ == file_) return;
    if (!is_whole(written_)) cannot_be_kept(file_.parent_path(), "the runtime did not write all of them");
    std::error_code failed;
    std::filesystem::rename(written_, file_, failed);
    if (failed) cannot_be_kept(file_.parent_path(), failed.message());
}

Packed::~Packed() {
    std::error_code ignored;
    if (written_ != file_) std::filesystem::remove(written_, ignored);
}

}  // namespace dreamedge
