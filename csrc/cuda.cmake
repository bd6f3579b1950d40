# Compiles cuda/*.cu, driving nvcc by rules of our own: CMake's CUDA language costs 2 seconds at each configuration, and
# its older releases don't know newer toolkits.
#
# Reads BYTEKERNELS_CUDA, BYTEKERNELS_CUDA_ARCHITECTURES, BYTEKERNELS_STRICT and cuda_sources. Sets cuda_objects, with
# nvcc, nvcc_version, cuda_includes and cuda_runtime; or, where there are none, cuda_refusal: a sentence.
set(cuda_objects "")
set(cuda_refusal "")
set(least_nvcc 12.8)  # the first that knows sm_100

# Sets nvcc to a path, or cuda_refusal.
function(find_nvcc)
  if(NOT "$ENV{CUDACXX}" STREQUAL "")
    set(where "as CUDACXX says ($ENV{CUDACXX})")
    find_program(found_nvcc "$ENV{CUDACXX}" NO_CACHE)
  else()
    set(where "in CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda/bin")
    find_program(found_nvcc nvcc NO_CACHE NO_DEFAULT_PATH
                 HINTS "$ENV{CUDA_HOME}/bin" "$ENV{CUDA_PATH}/bin" ENV PATH /usr/local/cuda/bin)
  endif()
  if(found_nvcc)
    set(nvcc "${found_nvcc}" PARENT_SCOPE)
  else()
    set(cuda_refusal "no nvcc was found ${where}" PARENT_SCOPE)
  endif()
endfunction()

# Sets nvcc_version, or cuda_refusal.
function(check_nvcc_version)
  execute_process(COMMAND "${nvcc}" --version OUTPUT_VARIABLE text ERROR_VARIABLE text RESULT_VARIABLE status)
  if(status EQUAL 0 AND text MATCHES "release ([0-9]+\\.[0-9]+)")
    set(nvcc_version "${CMAKE_MATCH_1}" PARENT_SCOPE)
    if(CMAKE_MATCH_1 VERSION_LESS least_nvcc)
      set(cuda_refusal
          "nvcc ${CMAKE_MATCH_1} at ${nvcc} is too old for sm_100, ${least_nvcc} or newer is needed" PARENT_SCOPE)
    endif()
  else()
    set(cuda_refusal "${nvcc} --version does not tell a release" PARENT_SCOPE)
  endif()
endfunction()

# Sets cuda_includes and cuda_runtime (the static library) from what nvcc says of itself, or cuda_refusal.
function(find_cuda_runtime)
  execute_process(COMMAND "${nvcc}" --dryrun -c nothing.cu OUTPUT_VARIABLE text ERROR_VARIABLE text)
  set(folders "")
  foreach(kind I L)
    string(REGEX MATCHALL "-${kind}[^\"\n]+" flags "${text}")
    list(TRANSFORM flags REPLACE "^-${kind}" "")
    set(folders_${kind} "${flags}")
  endforeach()
  find_path(found_header cuda_runtime.h NO_CACHE NO_DEFAULT_PATH HINTS ${folders_I})
  find_library(found_library cudart_static NO_CACHE NO_DEFAULT_PATH HINTS ${folders_L})
  if(found_header AND found_library)
    set(cuda_includes "${found_header}" PARENT_SCOPE)
    set(cuda_runtime "${found_library}" PARENT_SCOPE)
  else()
    set(cuda_refusal "the toolkit of ${nvcc} lacks cuda_runtime.h or libcudart_static.a" PARENT_SCOPE)
  endif()
endfunction()

# Sets nvcc_flags, or cuda_refusal.
function(choose_nvcc_flags)
  set(host "${CMAKE_CXX_COMPILER}")
  if(NOT "$ENV{CUDAHOSTCXX}" STREQUAL "")
    set(host "$ENV{CUDAHOSTCXX}")
  endif()
  set(flags -std=c++17 -O3 -lineinfo "-ccbin=${host}" -Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra
            -Xptxas=-warn-spills)
  if(CMAKE_BUILD_TYPE STREQUAL "Release")
    list(APPEND flags -DNDEBUG)
  endif()
  if(BYTEKERNELS_STRICT)
    list(APPEND flags -Werror=all-warnings -Xcompiler=-Werror -Xptxas=-v)
  endif()
  list(GET BYTEKERNELS_CUDA_ARCHITECTURES -1 last)
  foreach(chip IN LISTS BYTEKERNELS_CUDA_ARCHITECTURES)
    if(NOT chip MATCHES "^[0-9]+[af]?$")
      message(FATAL_ERROR
              "BYTEKERNELS_CUDA_ARCHITECTURES must be numbers such as 90 or 100a, joined by semicolons, got ${chip}")
    endif()
    set(code "sm_${chip}")
    if(chip STREQUAL last)
      set(code "[sm_${chip},compute_${chip}]")
    endif()
    list(APPEND flags "-gencode=arch=compute_${chip},code=${code}")
  endforeach()
  set(nvcc_flags "${flags}" PARENT_SCOPE)
endfunction()

# Sets cuda_refusal where nvcc cannot compile a kernel with nvcc_flags. What it could is remembered.
function(try_nvcc)
  set(question "${nvcc} ${nvcc_version} ${nvcc_flags}")
  if(BYTEKERNELS_NVCC_WORKS STREQUAL question)
    return()
  endif()
  set(folder "${CMAKE_CURRENT_BINARY_DIR}/try_nvcc")
  file(WRITE "${folder}/try.cu"
       "#include <cuda_runtime.h>\n#include <string>\n__global__ void kernel(int* p) { *p = 1; }\n"
       "void launch(int* p) { kernel<<<1, 1>>>(p); }\n")
  execute_process(COMMAND "${nvcc}" ${nvcc_flags} -c try.cu -o try.o WORKING_DIRECTORY "${folder}"
                  OUTPUT_VARIABLE text ERROR_VARIABLE text RESULT_VARIABLE status)
  if(status EQUAL 0)
    set(BYTEKERNELS_NVCC_WORKS "${question}" CACHE INTERNAL "The nvcc that compiled a kernel, and its flags")
    return()
  endif()
  if(NOT text MATCHES "[^\n]*(error|fatal|unsupported|not found|No such)[^\n]*")
    string(REGEX MATCH "[^\n]+" CMAKE_MATCH_0 "${text}")
  endif()
  set(cuda_refusal "nvcc ${nvcc_version} at ${nvcc} can't compile a kernel: ${CMAKE_MATCH_0}" PARENT_SCOPE)
endfunction()

if(NOT BYTEKERNELS_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "BYTEKERNELS_CUDA must be AUTO, ON or OFF, got ${BYTEKERNELS_CUDA}")
elseif(BYTEKERNELS_CUDA STREQUAL "OFF")
  set(cuda_refusal "it was built with BYTEKERNELS_CUDA=OFF")
elseif(NOT cuda_sources)
  set(cuda_refusal "csrc/cuda holds no .cu file")
endif()
foreach(step find_nvcc check_nvcc_version find_cuda_runtime choose_nvcc_flags try_nvcc)
  if(NOT cuda_refusal)
    cmake_language(CALL ${step})
  endif()
endforeach()
if(cuda_refusal)
  return()
endif()

foreach(source IN LISTS cuda_sources)
  get_filename_component(name "${source}" NAME)
  set(object "${CMAKE_CURRENT_BINARY_DIR}/cuda/${name}.o")
  add_custom_command(
    OUTPUT "${object}"
    COMMAND "${nvcc}" ${nvcc_flags} "-I${CMAKE_CURRENT_SOURCE_DIR}" -MD -MF "${object}.d" -MT "cuda/${name}.o"
            -c "${source}" -o "${object}"
    DEPENDS "${source}"
    DEPFILE "${object}.d"
    COMMENT "Compiling cuda/${name}"
    VERBATIM)
  list(APPEND cuda_objects "${object}")
endforeach()
file(MAKE_DIRECTORY "${CMAKE_CURRENT_BINARY_DIR}/cuda")
