; What one pass over rows of one dtype ($name) can do. $step numbers of a row at a time, which widths are a multiple of.
; Every number is rounded as written here, on any processor: no sum is taken in another order, nothing is fused.

; The Euclidean norm of each of %n rows of %d numbers, a multiple of $step: float.
define void @norms_$name(ptr %rows, i64 %n, i64 %d, ptr %norms) {
entry:
  %is_empty = icmp eq i64 %n, 0
  br i1 %is_empty, label %done, label %row
row:
  %r = phi i64 [ 0, %entry ], [ %r.next, %row.end ]
  %row.first = mul i64 %r, %d
  br label %step
step:
  %at = phi i64 [ 0, %row ], [ %at.next, %step ]
  %sum = phi <$step x float> [ zeroinitializer, %row ], [ %sum.next, %step ]
  %i = add i64 %row.first, %at
  %from = getelementptr $stored, ptr %rows, i64 %i
  $load
  %square = fmul <$step x float> %x, %x
  %sum.next = fadd <$step x float> %sum, %square
  %at.next = add i64 %at, $step
  %more.steps = icmp ult i64 %at.next, %d
  br i1 %more.steps, label %step, label %row.end
row.end:
  $total
  %norm = call float @llvm.sqrt.f32(float %total)
  %to = getelementptr float, ptr %norms, i64 %r
  store float %norm, ptr %to
  %r.next = add i64 %r, 1
  %more.rows = icmp ult i64 %r.next, %n
  br i1 %more.rows, label %row, label %done
done:
  ret void
}

; What %n rows of codes stand for: offset + scale * code of each column, rounded to the dtype.
define void @said_$name(ptr %codes, i64 %n, i64 %d, ptr %scale, ptr %offset, ptr %rows) {
entry:
  %is_empty = icmp eq i64 %n, 0
  br i1 %is_empty, label %done, label %row
row:
  %r = phi i64 [ 0, %entry ], [ %r.next, %row.end ]
  %row.first = mul i64 %r, %d
  br label %columns
columns:
  %c = phi i64 [ 0, %row ], [ %c.next, %columns ]
  %i = add i64 %row.first, %c
  %from = getelementptr i8, ptr %codes, i64 %i
  %code = load <$step x i8>, ptr %from, align 1
  %whole = zext <$step x i8> %code to <$step x i32>
  %t = sitofp <$step x i32> %whole to <$step x float>
  %scale.at = getelementptr float, ptr %scale, i64 %c
  %scale.c = load <$step x float>, ptr %scale.at, align 4
  %offset.at = getelementptr float, ptr %offset, i64 %c
  %offset.c = load <$step x float>, ptr %offset.at, align 4
  %scaled = fmul <$step x float> %t, %scale.c
  %y = fadd <$step x float> %scaled, %offset.c
  %to = getelementptr $stored, ptr %rows, i64 %i
  $keep
  store <$step x $stored> %kept, ptr %to, align 2
  %c.next = add i64 %c, $step
  %more.columns = icmp ult i64 %c.next, %d
  br i1 %more.columns, label %columns, label %row.end
row.end:
  %r.next = add i64 %r, 1
  %more.rows = icmp ult i64 %r.next, %n
  br i1 %more.rows, label %row, label %done
done:
  ret void
}

; %n rows of %d numbers (float), rounded to the dtype, to the rows of %target whose numbers %slots are, around the caches; none
; where that is negative. Rows of %target begin where a multiple of $step numbers of them does.
define void @placed_$name(ptr %numbers, i64 %n, i64 %d, ptr %slots, ptr %target) {
entry:
  %is_empty = icmp eq i64 %n, 0
  br i1 %is_empty, label %done, label %row
row:
  %r = phi i64 [ 0, %entry ], [ %r.next, %row.end ]
  %slot.at = getelementptr i64, ptr %slots, i64 %r
  %slot = load i64, ptr %slot.at
  %is_one = icmp sge i64 %slot, 0
  br i1 %is_one, label %one, label %row.end
one:
  %row.first = mul i64 %r, %d
  %target.first = mul i64 %slot, %d
  br label %columns
columns:
  %c = phi i64 [ 0, %one ], [ %c.next, %columns ]
  %i = add i64 %row.first, %c
  %from = getelementptr float, ptr %numbers, i64 %i
  %y = load <$step x float>, ptr %from, align 4
  %j = add i64 %target.first, %c
  %to = getelementptr $stored, ptr %target, i64 %j
  $keep
  store <$step x $stored> %kept, ptr %to, align $aligned, !nontemporal !0
  %c.next = add i64 %c, $step
  %more.columns = icmp ult i64 %c.next, %d
  br i1 %more.columns, label %columns, label %row.end
row.end:
  %r.next = add i64 %r, 1
  %more.rows = icmp ult i64 %r.next, %n
  br i1 %more.rows, label %row, label %done
done:
  fence seq_cst
  ret void
}
