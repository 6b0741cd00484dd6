#include "processor.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <fstream>
#include <set>
#include <sstream>
#include <utility>

#ifdef __aarch64__
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace dreamedge {

#ifdef __aarch64__

// Asked of the kernel, not read from /proc/cpuinfo: under an emulator that is of the machine below.
std::vector<std::string> features() {
    const auto first = getauxval(AT_HWCAP), second = getauxval(AT_HWCAP2);
    const std::array<std::pair<const char*, bool>, 8> known{{{"asimdhp", (first & HWCAP_ASIMDHP) != 0},
                                                             {"asimddp", (first & HWCAP_ASIMDDP) != 0},
                                                             {"sve", (first & HWCAP_SVE) != 0},
                                                             {"sve2", (second & HWCAP2_SVE2) != 0},
                                                             {"i8mm", (second & HWCAP2_I8MM) != 0},
                                                             {"bf16", (second & HWCAP2_BF16) != 0},
                                                             {"sme", (second & HWCAP2_SME) != 0},
                                                             {"smei8i32", (second & HWCAP2_SME_I8I32) != 0}}};
    std::vector<std::string> found;
    for (const auto& [name, is_there] : known) {
        if (is_there) found.emplace_back(name);
    }
    return found;
}

bool multiplies_right() {
    if ((getauxval(AT_HWCAP2) & HWCAP2_SME_I8I32) == 0) return true;
    // Bytes of a streaming vector; the products of all its groups of four bytes fill a square of int32.
    uint64_t n_bytes = 0;
    asm volatile(".arch_extension sme\n rdsvl %0, #1" : "=r"(n_bytes));
    const uint64_t n = n_bytes / 4;
    std::vector<int8_t> a(n_bytes), b(n_bytes);
    for (uint64_t i = 0; i < n_bytes; ++i) {
        a[i] = static_cast<int8_t>(7 * i - 50);
        b[i] = static_cast<int8_t>(93 - 5 * i);
    }
    std::vector<int32_t> product(n * n);
    // Entering and leaving the mode of it clears all vector registers.
    asm volatile(
        ".arch_extension sme\n"
        "smstart\n"
        "ptrue p0.b\n"
        "ld1b {z0.b}, p0/z, [%0]\n"
        "ld1b {z1.b}, p0/z, [%1]\n"
        "zero {za}\n"
        "smopa za0.s, p0/m, p0/m, z0.b, z1.b\n"
        "mov x12, #0\n"
        "mov x11, %2\n"
        "1: st1w {za0h.s[w12, 0]}, p0, [x11]\n"
        "add x11, x11, %4\n"
        "add x12, x12, #1\n"
        "cmp x12, %3\n"
        "b.lt 1b\n"
        "smstop\n"
        :
        : "r"(a.data()), "r"(b.data()), "r"(product.data()), "r"(n), "r"(n_bytes)
        : "x11", "x12", "memory", "cc", "v0", "v1", "v2", "v3", "v4", "v5", "v6", "v7", "v8", "v9", "v10", "v11", "v12",
          "v13", "v14", "v15", "v16", "v17", "v18", "v19", "v20", "v21", "v22", "v23", "v24", "v25", "v26", "v27",
          "v28", "v29", "v30", "v31");
    for (uint64_t i = 0; i < n; ++i) {
        for (uint64_t j = 0; j < n; ++j) {
            int32_t sum = 0;
            for (uint64_t k = 0; k < 4; ++k) sum += a[4 * i + k] * b[4 * j + k];
            if (product[i * n + j] != sum) return false;
        }
    }
    return true;
}

#else

bool multiplies_right() { return true; }

std::vector<std::string> features() {
    std::set<std::string> flags;
    std::ifstream listing("/proc/cpuinfo");
    for (std::string line; flags.empty() && std::getline(listing, line);) {
        if (line.rfind("flags", 0) != 0) continue;
        std::istringstream words(line.substr(line.find(':') + 1));
        for (std::string word; words >> word;) flags.insert(word);
    }
    std::vector<std::string> found;
    for (const char* name : {"avx", "f16c", "fma", "avx2", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx_vnni",
                             "avx512_fp16", "amx_int8"}) {
        if (flags.count(name) != 0) found.emplace_back(name);
    }
    return found;
}

#endif

bool native_float16() {
    const auto found = features();
    return std::any_of(found.begin(), found.end(),
                       [](const std::string& name) { return name == "asimdhp" || name == "avx512_fp16"; });
}

}  // namespace dreamedge
