; crc32c of %n bytes behind those whose crc32c is %before: three parts of a block at once, because an instruction waits for the one before it, then put together.
define i32 @crc32c(ptr %data, i64 %n, ptr %shift, i32 %before) {
entry:
  %begun = xor i32 %before, -1
  %begun.wide = zext i32 %begun to i64
  br label %block
block:
  %at = phi i64 [ 0, %entry ], [ %at.next, %join ]
  %crc = phi i64 [ %begun.wide, %entry ], [ %joined, %join ]
  %at.next = add i64 %at, 4032
  %is_whole = icmp ule i64 %at.next, %n
  br i1 %is_whole, label %parts, label %rest
parts:
  %a.part = getelementptr i8, ptr %data, i64 %at
  %b.part = getelementptr i8, ptr %a.part, i64 1344
  %c.part = getelementptr i8, ptr %b.part, i64 1344
  br label %words
words:
  %k = phi i64 [ 0, %parts ], [ %k.next, %words ]
  %a = phi i64 [ %crc, %parts ], [ %a.next, %words ]
  %b = phi i64 [ 0, %parts ], [ %b.next, %words ]
  %c = phi i64 [ 0, %parts ], [ %c.next, %words ]
  %a.at.0 = getelementptr i8, ptr %a.part, i64 %k
  %a.word.0 = load i64, ptr %a.at.0, align 1
  %a.0 = call i64 @llvm.x86.sse42.crc32.64.64(i64 %a, i64 %a.word.0)
  %b.at.0 = getelementptr i8, ptr %b.part, i64 %k
  %b.word.0 = load i64, ptr %b.at.0, align 1
  %b.0 = call i64 @llvm.x86.sse42.crc32.64.64(i64 %b, i64 %b.word.0)
  %c.at.0 = getelementptr i8, ptr %c.part, i64 %k
  %c.word.0 = load i64, ptr %c.at.0, align 1
  %c.0 = call i64 @llvm.x86.sse42.crc32.64.64(i64 %c, i64 %c.word.0)
  %k.1 = add i64 %k, 8
  %a.at.1 = getelementptr i8, ptr %a.part, i64 %k.1
  %a.word.1 = load i64, ptr %a.at.1, align 1
  %a.1 = call i64 @llvm.x86.sse42.crc32.64.64(i64 %a.0, i64 %a.word.1)
  %b.at.1 = getelementptr i8, ptr %b.part, i64 %k.1
  %b.word.1 = load i64, ptr %b.at.1, align 1
  %b.1 = call i64 @llvm.x86.sse42.crc32.64.64(i64 %b.0, i64 %b.word.1)
  %c.at.1 = getelementptr i8, ptr %c.part, i64 %k.1
  %c.word.1 = load i64, ptr %c.at.1, align 1
  %c.1 = call i64 @llvm.x86.sse42.crc32.64.64(i64 %c.0, i64 %c.word.1)
  %k.2 = add i64 %k, 16
  %a.at.2 = getelementptr i8, ptr %a.part, i64 %k.2
  %a.word.2 = load i64, ptr %a.at.2, align 1
  %a.2 = call i64 @llvm.x86.sse42.crc32.64.64(i64 %a.1, i64 %a.word.2)
  %b.at.2 = getelementptr i8, ptr %b.part, i64 %k.2
  %b.word.2 = load i64, ptr %b.at.2, align 1
  %b.2 = call i64 @llvm.x86.sse42.crc32.64.64(i64 %b.1, i64 %b.word.2)
  %c.at.2 = getelementptr i8, ptr %c.part, i64 %k.2
  %c.word.2 = load i64, ptr %c.at.2, align 1
  %c.2 = call i64 @llvm.x86.sse42.crc32.64.64(i64 %c.1, i64 %c.word.2)
  %k.3 = add i64 %k, 24
  %a.at.3 = getelementptr i8, ptr %a.part, i64 %k.3
  %a.word.3 = load i64, ptr %a.at.3, align 1
  %a.next = call i64 @llvm.x86.sse42.crc32.64.64(i64 %a.2, i64 %a.word.3)
  %b.at.3 = getelementptr i8, ptr %b.part, i64 %k.3
  %b.word.3 = load i64, ptr %b.at.3, align 1
  %b.next = call i64 @llvm.x86.sse42.crc32.64.64(i64 %b.2, i64 %b.word.3)
  %c.at.3 = getelementptr i8, ptr %c.part, i64 %k.3
  %c.word.3 = load i64, ptr %c.at.3, align 1
  %c.next = call i64 @llvm.x86.sse42.crc32.64.64(i64 %c.2, i64 %c.word.3)
  %k.next = add i64 %k, 32
  %more.words = icmp ult i64 %k.next, 1344
  br i1 %more.words, label %words, label %join
join:
  %a.shifted = call i64 @shifted(i64 %a.next, ptr %shift)
  %ab = xor i64 %a.shifted, %b.next
  %ab.shifted = call i64 @shifted(i64 %ab, ptr %shift)
  %joined = xor i64 %ab.shifted, %c.next
  br label %block
rest:
  %r = phi i64 [ %at, %block ], [ %r.next, %byte ]
  %r.crc = phi i64 [ %crc, %block ], [ %r.crc.next, %byte ]
  %is_more = icmp ult i64 %r, %n
  br i1 %is_more, label %byte, label %done
byte:
  %r.at = getelementptr i8, ptr %data, i64 %r
  %r.byte = load i8, ptr %r.at
  %r.crc.low = trunc i64 %r.crc to i32
  %r.crc.new = call i32 @llvm.x86.sse42.crc32.32.8(i32 %r.crc.low, i8 %r.byte)
  %r.crc.next = zext i32 %r.crc.new to i64
  %r.next = add i64 %r, 1
  br label %rest
done:
  %last = trunc i64 %r.crc to i32
  %inverted = xor i32 %last, -1
  ret i32 %inverted
}

; What a crc becomes behind a part of zeros: a sum of what its bytes become.
define internal i64 @shifted(i64 %crc, ptr %shift) alwaysinline {
entry:
  %0 = and i64 %crc, 255
  %1 = getelementptr i32, ptr %shift, i64 %0
  %2 = load i32, ptr %1
  %3 = lshr i64 %crc, 8
  %4 = and i64 %3, 255
  %5 = or i64 %4, 256
  %6 = getelementptr i32, ptr %shift, i64 %5
  %7 = load i32, ptr %6
  %8 = lshr i64 %crc, 16
  %9 = and i64 %8, 255
  %10 = or i64 %9, 512
  %11 = getelementptr i32, ptr %shift, i64 %10
  %12 = load i32, ptr %11
  %13 = lshr i64 %crc, 24
  %14 = or i64 %13, 768
  %15 = getelementptr i32, ptr %shift, i64 %14
  %16 = load i32, ptr %15
  %17 = xor i32 %2, %7
  %18 = xor i32 %12, %16
  %19 = xor i32 %17, %18
  %20 = zext i32 %19 to i64
  ret i64 %20
}
declare void @llvm.prefetch.p0(ptr, i32 immarg, i32 immarg, i32 immarg)
