; crc32c of %n bytes behind those whose crc32c is %before, 256 at a time: each 128 bits are multiplied by what x^2048 leaves of a division by the polynomial, and
; added to those 2048 bits further on (Gopal et al., "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ
; Instruction", Intel, 2009). What lies 2 KiB further on is fetched meanwhile. Constants: x^(d + 63) and x^(d - 1) modulo the polynomial, bits reversed, for d bits.
define i32 @crc32c(ptr %data, i64 %n, ptr %shift, i32 %before) {
entry:
  %begun = xor i32 %before, -1
  %is_short = icmp ult i64 %n, 256
  br i1 %is_short, label %rest, label %begin
begin:
  %first.0.at = getelementptr i8, ptr %data, i64 0
  %first.0 = load <8 x i64>, ptr %first.0.at, align 1
  %first.1.at = getelementptr i8, ptr %data, i64 64
  %first.1 = load <8 x i64>, ptr %first.1.at, align 1
  %first.2.at = getelementptr i8, ptr %data, i64 128
  %first.2 = load <8 x i64>, ptr %first.2.at, align 1
  %first.3.at = getelementptr i8, ptr %data, i64 192
  %first.3 = load <8 x i64>, ptr %first.3.at, align 1
  %begun.wide = zext i32 %begun to i64
  %begun.lanes = insertelement <8 x i64> zeroinitializer, i64 %begun.wide, i64 0
  %start = xor <8 x i64> %first.0, %begun.lanes
  br label %block
block:
  %at = phi i64 [ 256, %begin ], [ %at.next, %fold ]
  %sum.0 = phi <8 x i64> [ %start, %begin ], [ %sum.0.next, %fold ]
  %sum.1 = phi <8 x i64> [ %first.1, %begin ], [ %sum.1.next, %fold ]
  %sum.2 = phi <8 x i64> [ %first.2, %begin ], [ %sum.2.next, %fold ]
  %sum.3 = phi <8 x i64> [ %first.3, %begin ], [ %sum.3.next, %fold ]
  %at.next = add i64 %at, 256
  %is_whole = icmp ule i64 %at.next, %n
  br i1 %is_whole, label %fold, label %join
fold:
  %from = getelementptr i8, ptr %data, i64 %at
  %later.0 = getelementptr i8, ptr %from, i64 2048
  call void @llvm.prefetch.p0(ptr %later.0, i32 0, i32 3, i32 1)
  %later.1 = getelementptr i8, ptr %from, i64 2112
  call void @llvm.prefetch.p0(ptr %later.1, i32 0, i32 3, i32 1)
  %later.2 = getelementptr i8, ptr %from, i64 2176
  call void @llvm.prefetch.p0(ptr %later.2, i32 0, i32 3, i32 1)
  %later.3 = getelementptr i8, ptr %from, i64 2240
  call void @llvm.prefetch.p0(ptr %later.3, i32 0, i32 3, i32 1)
  %from.0 = getelementptr i8, ptr %from, i64 0
  %new.0 = load <8 x i64>, ptr %from.0, align 1
  %low.0 = call <8 x i64> @llvm.x86.pclmulqdq.512(<8 x i64> %sum.0, <8 x i64> <i64 -1610642981159698432, i64 1452032738021343232, i64 -1610642981159698432, i64 1452032738021343232, i64 -1610642981159698432, i64 1452032738021343232, i64 -1610642981159698432, i64 1452032738021343232>, i8 0)
  %high.0 = call <8 x i64> @llvm.x86.pclmulqdq.512(<8 x i64> %sum.0, <8 x i64> <i64 -1610642981159698432, i64 1452032738021343232, i64 -1610642981159698432, i64 1452032738021343232, i64 -1610642981159698432, i64 1452032738021343232, i64 -1610642981159698432, i64 1452032738021343232>, i8 17)
  %folded.0 = xor <8 x i64> %low.0, %high.0
  %sum.0.next = xor <8 x i64> %folded.0, %new.0
  %from.1 = getelementptr i8, ptr %from, i64 64
  %new.1 = load <8 x i64>, ptr %from.1, align 1
  %low.1 = call <8 x i64> @llvm.x86.pclmulqdq.512(<8 x i64> %sum.1, <8 x i64> <i64 -1610642981159698432, i64 1452032738021343232, i64 -1610642981159698432, i64 1452032738021343232, i64 -1610642981159698432, i64 1452032738021343232, i64 -1610642981159698432, i64 1452032738021343232>, i8 0)
  %high.1 = call <8 x i64> @llvm.x86.pclmulqdq.512(<8 x i64> %sum.1, <8 x i64> <i64 -1610642981159698432, i64 1452032738021343232, i64 -1610642981159698432, i64 1452032738021343232, i64 -1610642981159698432, i64 1452032738021343232, i64 -1610642981159698432, i64 1452032738021343232>, i8 17)
  %folded.1 = xor <8 x i64> %low.1, %high.1
  %sum.1.next = xor <8 x i64> %folded.1, %new.1
  %from.2 = getelementptr i8, ptr %from, i64 128
  %new.2 = load <8 x i64>, ptr %from.2, align 1
  %low.2 = call <8 x i64> @llvm.x86.pclmulqdq.512(<8 x i64> %sum.2, <8 x i64> <i64 -1610642981159698432, i64 1452032738021343232, i64 -1610642981159698432, i64 1452032738021343232, i64 -1610642981159698432, i64 1452032738021343232, i64 -1610642981159698432, i64 1452032738021343232>, i8 0)
  %high.2 = call <8 x i64> @llvm.x86.pclmulqdq.512(<8 x i64> %sum.2, <8 x i64> <i64 -1610642981159698432, i64 1452032738021343232, i64 -1610642981159698432, i64 1452032738021343232, i64 -1610642981159698432, i64 1452032738021343232, i64 -1610642981159698432, i64 1452032738021343232>, i8 17)
  %folded.2 = xor <8 x i64> %low.2, %high.2
  %sum.2.next = xor <8 x i64> %folded.2, %new.2
  %from.3 = getelementptr i8, ptr %from, i64 192
  %new.3 = load <8 x i64>, ptr %from.3, align 1
  %low.3 = call <8 x i64> @llvm.x86.pclmulqdq.512(<8 x i64> %sum.3, <8 x i64> <i64 -1610642981159698432, i64 1452032738021343232, i64 -1610642981159698432, i64 1452032738021343232, i64 -1610642981159698432, i64 1452032738021343232, i64 -1610642981159698432, i64 1452032738021343232>, i8 0)
  %high.3 = call <8 x i64> @llvm.x86.pclmulqdq.512(<8 x i64> %sum.3, <8 x i64> <i64 -1610642981159698432, i64 1452032738021343232, i64 -1610642981159698432, i64 1452032738021343232, i64 -1610642981159698432, i64 1452032738021343232, i64 -1610642981159698432, i64 1452032738021343232>, i8 17)
  %folded.3 = xor <8 x i64> %low.3, %high.3
  %sum.3.next = xor <8 x i64> %folded.3, %new.3
  br label %block
join:
  %join.low.1 = call <8 x i64> @llvm.x86.pclmulqdq.512(<8 x i64> %sum.0, <8 x i64> <i64 2024689343301419008, i64 8483555033831440384, i64 2024689343301419008, i64 8483555033831440384, i64 2024689343301419008, i64 8483555033831440384, i64 2024689343301419008, i64 8483555033831440384>, i8 0)
  %join.high.1 = call <8 x i64> @llvm.x86.pclmulqdq.512(<8 x i64> %sum.0, <8 x i64> <i64 2024689343301419008, i64 8483555033831440384, i64 2024689343301419008, i64 8483555033831440384, i64 2024689343301419008, i64 8483555033831440384, i64 2024689343301419008, i64 8483555033831440384>, i8 17)
  %join.both.1 = xor <8 x i64> %join.low.1, %join.high.1
  %joined.1 = xor <8 x i64> %join.both.1, %sum.1
  %join.low.2 = call <8 x i64> @llvm.x86.pclmulqdq.512(<8 x i64> %joined.1, <8 x i64> <i64 2024689343301419008, i64 8483555033831440384, i64 2024689343301419008, i64 8483555033831440384, i64 2024689343301419008, i64 8483555033831440384, i64 2024689343301419008, i64 8483555033831440384>, i8 0)
  %join.high.2 = call <8 x i64> @llvm.x86.pclmulqdq.512(<8 x i64> %joined.1, <8 x i64> <i64 2024689343301419008, i64 8483555033831440384, i64 2024689343301419008, i64 8483555033831440384, i64 2024689343301419008, i64 8483555033831440384, i64 2024689343301419008, i64 8483555033831440384>, i8 17)
  %join.both.2 = xor <8 x i64> %join.low.2, %join.high.2
  %joined.2 = xor <8 x i64> %join.both.2, %sum.2
  %join.low.3 = call <8 x i64> @llvm.x86.pclmulqdq.512(<8 x i64> %joined.2, <8 x i64> <i64 2024689343301419008, i64 8483555033831440384, i64 2024689343301419008, i64 8483555033831440384, i64 2024689343301419008, i64 8483555033831440384, i64 2024689343301419008, i64 8483555033831440384>, i8 0)
  %join.high.3 = call <8 x i64> @llvm.x86.pclmulqdq.512(<8 x i64> %joined.2, <8 x i64> <i64 2024689343301419008, i64 8483555033831440384, i64 2024689343301419008, i64 8483555033831440384, i64 2024689343301419008, i64 8483555033831440384, i64 2024689343301419008, i64 8483555033831440384>, i8 17)
  %join.both.3 = xor <8 x i64> %join.low.3, %join.high.3
  %joined.3 = xor <8 x i64> %join.both.3, %sum.3
  %lane.0 = shufflevector <8 x i64> %joined.3, <8 x i64> poison, <2 x i32> <i32 0, i32 1>
  %lane.1 = shufflevector <8 x i64> %joined.3, <8 x i64> poison, <2 x i32> <i32 2, i32 3>
  %lane.2 = shufflevector <8 x i64> %joined.3, <8 x i64> poison, <2 x i32> <i32 4, i32 5>
  %lane.3 = shufflevector <8 x i64> %joined.3, <8 x i64> poison, <2 x i32> <i32 6, i32 7>
  %lane.low.1 = call <2 x i64> @llvm.x86.pclmulqdq(<2 x i64> %lane.0, <2 x i64> <i64 3982298886646530048, i64 3562862082850291712>, i8 0)
  %lane.high.1 = call <2 x i64> @llvm.x86.pclmulqdq(<2 x i64> %lane.0, <2 x i64> <i64 3982298886646530048, i64 3562862082850291712>, i8 17)
  %lane.both.1 = xor <2 x i64> %lane.low.1, %lane.high.1
  %last.1 = xor <2 x i64> %lane.both.1, %lane.1
  %lane.low.2 = call <2 x i64> @llvm.x86.pclmulqdq(<2 x i64> %last.1, <2 x i64> <i64 3982298886646530048, i64 3562862082850291712>, i8 0)
  %lane.high.2 = call <2 x i64> @llvm.x86.pclmulqdq(<2 x i64> %last.1, <2 x i64> <i64 3982298886646530048, i64 3562862082850291712>, i8 17)
  %lane.both.2 = xor <2 x i64> %lane.low.2, %lane.high.2
  %last.2 = xor <2 x i64> %lane.both.2, %lane.2
  %lane.low.3 = call <2 x i64> @llvm.x86.pclmulqdq(<2 x i64> %last.2, <2 x i64> <i64 3982298886646530048, i64 3562862082850291712>, i8 0)
  %lane.high.3 = call <2 x i64> @llvm.x86.pclmulqdq(<2 x i64> %last.2, <2 x i64> <i64 3982298886646530048, i64 3562862082850291712>, i8 17)
  %lane.both.3 = xor <2 x i64> %lane.low.3, %lane.high.3
  %last.3 = xor <2 x i64> %lane.both.3, %lane.3
  %word.0 = extractelement <2 x i64> %last.3, i64 0
  %word.1 = extractelement <2 x i64> %last.3, i64 1
  %crc.0 = call i64 @llvm.x86.sse42.crc32.64.64(i64 0, i64 %word.0)
  %crc.1 = call i64 @llvm.x86.sse42.crc32.64.64(i64 %crc.0, i64 %word.1)
  %crc.wide = trunc i64 %crc.1 to i32
  br label %rest
rest:
  %r = phi i64 [ 0, %entry ], [ %at, %join ], [ %r.next, %byte ]
  %r.crc = phi i32 [ %begun, %entry ], [ %crc.wide, %join ], [ %r.crc.next, %byte ]
  %is_more = icmp ult i64 %r, %n
  br i1 %is_more, label %byte, label %done
byte:
  %r.at = getelementptr i8, ptr %data, i64 %r
  %r.byte = load i8, ptr %r.at
  %r.crc.next = call i32 @llvm.x86.sse42.crc32.32.8(i32 %r.crc, i8 %r.byte)
  %r.next = add i64 %r, 1
  br label %rest
done:
  %inverted = xor i32 %r.crc, -1
  ret i32 %inverted
}
declare <8 x i64> @llvm.x86.pclmulqdq.512(<8 x i64>, <8 x i64>, i8 immarg)
declare <2 x i64> @llvm.x86.pclmulqdq(<2 x i64>, <2 x i64>, i8 immarg)
declare void @llvm.prefetch.p0(ptr, i32 immarg, i32 immarg, i32 immarg)
