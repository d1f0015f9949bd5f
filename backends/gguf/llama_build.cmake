# Leaves out of llama-cpp-python's source build what tightrope never calls: llama.cpp's `common` helper library, which its
# build file forces on. CMake reads this file right after llama.cpp's project() line
# (-DCMAKE_PROJECT_llama.cpp_INCLUDE=THIS_FILE); a plain variable set here hides the forced cache entry of that name.
set(LLAMA_BUILD_COMMON OFF)
