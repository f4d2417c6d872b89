; What one pass over columns of rows of one dtype ($name) can do: $step of them at a time, from one row to the next.
; Every number is rounded as written here, on any processor: no sum is taken in another order, nothing is fused.

; Of columns of rows %stride numbers apart, deviations from %centre (float): %sums and %squares (double) are added to, and
; %least and %greatest numbers (float) carried on. Sums are of float over %block rows, of double over these.
define void @moments_$name(ptr %rows, i64 %stride, i64 %n, i64 %d, i64 %block, ptr %centre,
                           ptr %sums, ptr %squares, ptr %least, ptr %greatest) {
entry:
  %is_empty = icmp eq i64 %n, 0
  br i1 %is_empty, label %done, label %rows.of
rows.of:
  %start = phi i64 [ 0, %entry ], [ %after, %block.end ]
  %after = add i64 %start, %block
  %is_short = icmp ugt i64 %after, %n
  %stop = select i1 %is_short, i64 %n, i64 %after
  br label %columns
columns:
  %c = phi i64 [ 0, %rows.of ], [ %c.next, %columns.end ]
  %centre.at = getelementptr float, ptr %centre, i64 %c
  %middle = load <$step x float>, ptr %centre.at, align 4
  %least.at = getelementptr float, ptr %least, i64 %c
  %least.0 = load <$step x float>, ptr %least.at, align 4
  %greatest.at = getelementptr float, ptr %greatest, i64 %c
  %greatest.0 = load <$step x float>, ptr %greatest.at, align 4
  br label %row
row:
  %r = phi i64 [ %start, %columns ], [ %r.next, %row ]
  %sum = phi <$step x float> [ zeroinitializer, %columns ], [ %sum.next, %row ]
  %square = phi <$step x float> [ zeroinitializer, %columns ], [ %square.next, %row ]
  %low = phi <$step x float> [ %least.0, %columns ], [ %low.next, %row ]
  %high = phi <$step x float> [ %greatest.0, %columns ], [ %high.next, %row ]
  %row.first = mul i64 %r, %stride
  %i = add i64 %row.first, %c
  %from = getelementptr $stored, ptr %rows, i64 %i
  $load
  %deviation = fsub <$step x float> %x, %middle
  %sum.next = fadd <$step x float> %sum, %deviation
  %squared = fmul <$step x float> %deviation, %deviation
  %square.next = fadd <$step x float> %square, %squared
  %is_less = fcmp olt <$step x float> %x, %low
  %low.next = select <$step x i1> %is_less, <$step x float> %x, <$step x float> %low
  %is_more = fcmp ogt <$step x float> %x, %high
  %high.next = select <$step x i1> %is_more, <$step x float> %x, <$step x float> %high
  %r.next = add i64 %r, 1
  %more.rows = icmp ult i64 %r.next, %stop
  br i1 %more.rows, label %row, label %columns.end
columns.end:
  store <$step x float> %low.next, ptr %least.at, align 4
  store <$step x float> %high.next, ptr %greatest.at, align 4
  %sums.at = getelementptr double, ptr %sums, i64 %c
  %sums.0 = load <$step x double>, ptr %sums.at, align 8
  %sum.wide = fpext <$step x float> %sum.next to <$step x double>
  %sums.1 = fadd <$step x double> %sums.0, %sum.wide
  store <$step x double> %sums.1, ptr %sums.at, align 8
  %squares.at = getelementptr double, ptr %squares, i64 %c
  %squares.0 = load <$step x double>, ptr %squares.at, align 8
  %square.wide = fpext <$step x float> %square.next to <$step x double>
  %squares.1 = fadd <$step x double> %squares.0, %square.wide
  store <$step x double> %squares.1, ptr %squares.at, align 8
  %c.next = add i64 %c, $step
  %more.columns = icmp ult i64 %c.next, %d
  br i1 %more.columns, label %columns, label %block.end
block.end:
  %more.blocks = icmp ult i64 %after, %n
  br i1 %more.blocks, label %rows.of, label %done
done:
  ret void
}

; The least and the greatest (float) of each column of %n rows; those in %least and %greatest are carried on.
define void @extremes_$name(ptr %rows, i64 %n, i64 %d, ptr %least, ptr %greatest) {
entry:
  %is_empty = icmp eq i64 %n, 0
  br i1 %is_empty, label %done, label %columns
columns:
  %c = phi i64 [ 0, %entry ], [ %c.next, %columns.end ]
  %least.at = getelementptr float, ptr %least, i64 %c
  %least.0 = load <$step x float>, ptr %least.at, align 4
  %greatest.at = getelementptr float, ptr %greatest, i64 %c
  %greatest.0 = load <$step x float>, ptr %greatest.at, align 4
  br label %row
row:
  %r = phi i64 [ 0, %columns ], [ %r.next, %row ]
  %low = phi <$step x float> [ %least.0, %columns ], [ %low.next, %row ]
  %high = phi <$step x float> [ %greatest.0, %columns ], [ %high.next, %row ]
  %row.first = mul i64 %r, %d
  %i = add i64 %row.first, %c
  %from = getelementptr $stored, ptr %rows, i64 %i
  $load
  %is_less = fcmp olt <$step x float> %x, %low
  %low.next = select <$step x i1> %is_less, <$step x float> %x, <$step x float> %low
  %is_more = fcmp ogt <$step x float> %x, %high
  %high.next = select <$step x i1> %is_more, <$step x float> %x, <$step x float> %high
  %r.next = add i64 %r, 1
  %more.rows = icmp ult i64 %r.next, %n
  br i1 %more.rows, label %row, label %columns.end
columns.end:
  store <$step x float> %low.next, ptr %least.at, align 4
  store <$step x float> %high.next, ptr %greatest.at, align 4
  %c.next = add i64 %c, $step
  %more.columns = icmp ult i64 %c.next, %d
  br i1 %more.columns, label %columns, label %done
done:
  ret void
}

; Squares of the differences of %n rows and %others are added to %squares of columns, of float over %block rows, then double.
define void @errors_$name(ptr %rows, ptr %others, i64 %n, i64 %d, i64 %block, ptr %squares) {
entry:
  %is_empty = icmp eq i64 %n, 0
  br i1 %is_empty, label %done, label %rows.of
rows.of:
  %start = phi i64 [ 0, %entry ], [ %after, %block.end ]
  %after = add i64 %start, %block
  %is_short = icmp ugt i64 %after, %n
  %stop = select i1 %is_short, i64 %n, i64 %after
  br label %columns
columns:
  %c = phi i64 [ 0, %rows.of ], [ %c.next, %columns.end ]
  br label %row
row:
  %r = phi i64 [ %start, %columns ], [ %r.next, %row ]
  %square = phi <$step x float> [ zeroinitializer, %columns ], [ %square.next, %row ]
  %row.first = mul i64 %r, %d
  %i = add i64 %row.first, %c
  %from = getelementptr $stored, ptr %rows, i64 %i
  $load
  %other.from = getelementptr $stored, ptr %others, i64 %i
  $load_other
  %error = fsub <$step x float> %x, %other
  %squared = fmul <$step x float> %error, %error
  %square.next = fadd <$step x float> %square, %squared
  %r.next = add i64 %r, 1
  %more.rows = icmp ult i64 %r.next, %stop
  br i1 %more.rows, label %row, label %columns.end
columns.end:
  %squares.at = getelementptr double, ptr %squares, i64 %c
  %squares.0 = load <$step x double>, ptr %squares.at, align 8
  %square.wide = fpext <$step x float> %square.next to <$step x double>
  %squares.1 = fadd <$step x double> %squares.0, %square.wide
  store <$step x double> %squares.1, ptr %squares.at, align 8
  %c.next = add i64 %c, $step
  %more.columns = icmp ult i64 %c.next, %d
  br i1 %more.columns, label %columns, label %block.end
block.end:
  %more.blocks = icmp ult i64 %after, %n
  br i1 %more.blocks, label %rows.of, label %done
done:
  ret void
}

; %n rows in codes: (number - offset) * inverse of each column, to the nearest of 0 to 255. %said are what these stand for: offset +
; scale * code, rounded to the dtype; the squares of the differences are added to %squares as above. A row that does not fit
; (of which the byte in %fits is 0) is 255 throughout, and said as it is.
define void @coded_$name(ptr %rows, i64 %n, i64 %d, i64 %block, ptr %fits, ptr %inverse, ptr %scale, ptr %offset,
                         ptr %codes, ptr %said, ptr %squares) {
entry:
  %is_empty = icmp eq i64 %n, 0
  br i1 %is_empty, label %done, label %rows.of
rows.of:
  %start = phi i64 [ 0, %entry ], [ %after, %block.end ]
  %after = add i64 %start, %block
  %is_short = icmp ugt i64 %after, %n
  %stop = select i1 %is_short, i64 %n, i64 %after
  br label %columns
columns:
  %c = phi i64 [ 0, %rows.of ], [ %c.next, %columns.end ]
  %inverse.at = getelementptr float, ptr %inverse, i64 %c
  %inverse.c = load <$step x float>, ptr %inverse.at, align 4
  %scale.at = getelementptr float, ptr %scale, i64 %c
  %scale.c = load <$step x float>, ptr %scale.at, align 4
  %offset.at = getelementptr float, ptr %offset, i64 %c
  %offset.c = load <$step x float>, ptr %offset.at, align 4
  br label %row
row:
  %r = phi i64 [ %start, %columns ], [ %r.next, %row.end ]
  %square = phi <$step x float> [ zeroinitializer, %columns ], [ %square.next, %row.end ]
  %row.first = mul i64 %r, %d
  %i = add i64 %row.first, %c
  %from = getelementptr $stored, ptr %rows, i64 %i
  %codes.at = getelementptr i8, ptr %codes, i64 %i
  %other.from = getelementptr $stored, ptr %said, i64 %i
  %fits.at = getelementptr i8, ptr %fits, i64 %r
  %fits.r = load i8, ptr %fits.at
  %is_fitting = icmp ne i8 %fits.r, 0
  br i1 %is_fitting, label %code, label %copy
copy:
  %same = load <$step x $stored>, ptr %from, align 2
  store <$step x $stored> %same, ptr %other.from, align 2
  store <$step x i8> $exact, ptr %codes.at, align 1
  br label %row.end
code:
  $load
  %over = fsub <$step x float> %x, %offset.c
  %t = fmul <$step x float> %over, %inverse.c
  %nearest = call <$step x float> @llvm.roundeven.v${step}f32(<$step x float> %t)
  %is_above = fcmp ogt <$step x float> %nearest, zeroinitializer
  %least = select <$step x i1> %is_above, <$step x float> %nearest, <$step x float> zeroinitializer
  %is_below = fcmp olt <$step x float> %least, $most
  %bounded = select <$step x i1> %is_below, <$step x float> %least, <$step x float> $most
  %whole = fptosi <$step x float> %bounded to <$step x i32>
  %code.8 = trunc <$step x i32> %whole to <$step x i8>
  store <$step x i8> %code.8, ptr %codes.at, align 1
  %scaled = fmul <$step x float> %bounded, %scale.c
  %y = fadd <$step x float> %scaled, %offset.c
  $keep
  store <$step x $stored> %kept, ptr %other.from, align 2
  $load_other
  %error = fsub <$step x float> %x, %other
  %squared = fmul <$step x float> %error, %error
  %square.sum = fadd <$step x float> %square, %squared
  br label %row.end
row.end:
  %square.next = phi <$step x float> [ %square, %copy ], [ %square.sum, %code ]
  %r.next = add i64 %r, 1
  %more.rows = icmp ult i64 %r.next, %stop
  br i1 %more.rows, label %row, label %columns.end
columns.end:
  %squares.at = getelementptr double, ptr %squares, i64 %c
  %squares.0 = load <$step x double>, ptr %squares.at, align 8
  %square.wide = fpext <$step x float> %square.next to <$step x double>
  %squares.1 = fadd <$step x double> %squares.0, %square.wide
  store <$step x double> %squares.1, ptr %squares.at, align 8
  %c.next = add i64 %c, $step
  %more.columns = icmp ult i64 %c.next, %d
  br i1 %more.columns, label %columns, label %block.end
block.end:
  %more.blocks = icmp ult i64 %after, %n
  br i1 %more.blocks, label %rows.of, label %done
done:
  ret void
}
