#include "processor.h"

#include <algorithm>
#include <array>
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

#else

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

}  // namespace dreamedge
